"""Run the compensate stage: ranks, the repairing walk, KL divergence on held-back text before and after."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import distributed
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.writer import Writer
from compresskit.compensation.method import OUTPUT_WEIGHT_WINDOWS, CompensateMethod
from compresskit.compensation.request import CompensateOptions, CompensateRequest, open_request
from compresskit.formats import peft
from compresskit.job import HELD_BACK, Job, run_request
from compresskit.machine.progress import timed
from compresskit.models.load import open_model, with_adapter
from compresskit.models.model import Model
from compresskit.models.pair import same_weights

if TYPE_CHECKING:
    import torch

    from compresskit.compensation.walk import Repair
    from compresskit.walk.walk import Walk

WORSE = 1.05
"""KL ratio (after / before) above which a repair counts as failed; smaller increases are noise of few windows."""


def compensate(
    method: CompensateMethod, source_name: str, out: Path, options: CompensateOptions, quiet: bool = True
) -> dict[str, Any]:
    """Repair a compressed checkpoint by an adapter, or into a dense checkpoint.

    Where source and original hold the same weights there is nothing to repair: nothing is written, and "output" is the
    source.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; `out` is then as it was before.
    """
    started = time.monotonic()
    request = open_request(method, source_name, out, options)
    nothing_to_repair = not method.splits and same_weights(request.pair)
    result = _nothing_to_repair(request) if nothing_to_repair else run_request(lambda: request, _compensate, quiet)
    return result | {"original": str(request.pair.original.checkpoint.folder)} | time_and_memory(started)


def _nothing_to_repair(request: CompensateRequest) -> dict[str, Any]:
    model = request.model
    sizes = model.parameters, model.bytes
    found = stage_result("compensate", {"method": request.name}, request.out, model.checkpoint, sizes, sizes)
    return found | {
        "output": str(model.checkpoint.folder),
        "rank_total": 0,
        "note": "source and original hold the same weights: nothing to compensate, nothing was written",
    }


def _compensate(request: CompensateRequest, job: Job) -> dict[str, Any]:
    from compresskit.compensation.walk import repair_blocks

    model, tokens = request.model, job.tokens[:-HELD_BACK]
    repair = _repair(request, job, tokens)
    writer = job.writer(request.outputs(repair.ranks), {"blocks": [], "ranks": repair.ranks})
    # A split leaves the model's function alone: its walk reads every block from the source.
    walked = [] if request.method.splits else writer.done
    finished = dict.fromkeys(walked, _written(request, repair.ranks, writer)) if walked else {}
    repair_blocks(repair, _walks(request, job, tokens, finished), writer, job.bars)
    writer.copy_missing(model.checkpoint)
    facts = _scores(request, job, _written(request, repair.ranks, writer)) | {"rank_total": sum(repair.ranks.values())}
    job.commit(writer, facts)
    written = writer.written[1]
    added = sum(rank * sum(model.linear_shape(name)) for name, rank in repair.ranks.items())
    # A merge takes the source's own adapter into the weights too.
    parameters = replace(model, adapter=None).parameters if request.options.merge else model.parameters + added
    after = parameters, written if request.dense else model.checkpoint.bytes + written
    seconds = {what: round(value, 2) for what, value in repair.seconds.items()}
    return job.result((model.parameters, model.bytes), after) | facts | {"ranks": repair.ranks, "time_shares": seconds}


def _repair(request: CompensateRequest, job: Job, tokens: torch.Tensor) -> Repair:
    """The walk's request, with the rank of every linear: asked for, found under the budget, or those of an interrupted run."""
    from compresskit.compensation.ranks import allocate_ranks
    from compresskit.compensation.walk import Repair, measured_gains
    from compresskit.machine.precision import torch_dtype

    method, model = request.method, request.model
    merged = torch_dtype(request.dense_dtype) if request.dense else None
    names = model.linears if request.dense else request.names
    repair = Repair(method, request.pair, names, request.aim, dtype=torch_dtype(request.factor_dtype), merged=merged)
    if method.weighs_outputs:
        with timed(repair.seconds, "output_weights"):
            repair.weights = _output_weights(request, job, tokens)
    if job.progress:
        repair.ranks = job.progress["facts"]["ranks"]
    elif method.rank_budget is None:
        repair.ranks = request.even_ranks()
    else:
        found = measured_gains(replace(repair, names=request.names), _walks(request, job, tokens, {}), job.bars)
        costs = {name: sum(model.linear_shape(name)) for name in request.names}
        repair.ranks = allocate_ranks(found, costs, method.budget(model, request.names), method.round_rank)
    repair.multipliers = peft.multipliers(request.adapter_ranks(repair.ranks), request.small_factors)
    return repair


def _output_weights(request: CompensateRequest, job: Job, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Effect of output errors of the repaired linears on the original's predictions, from some of the windows."""
    from compresskit.compensation.output_fisher import LEAST, output_weights
    from compresskit.walk.walk import Walk

    walk = Walk(request.pair.original, tokens[:OUTPUT_WEIGHT_WINDOWS], job.where, 1, job.images, dealt=False)
    with job.work.scratch() as scratch:
        found = output_weights(walk, request.names, scratch, job.bars, request.options.seed)
    return {name: request.pair.cut_outputs(name, values).clamp_min(LEAST) for name, values in found.items()}


def _walks(request: CompensateRequest, job: Job, tokens: torch.Tensor, finished: Mapping[int, Model]) -> tuple[Walk, Walk | None]:
    """Of the compressed model, finished blocks from what was written, and of the original where its outputs are aimed at."""
    from compresskit.walk.cost import micro_batch_size
    from compresskit.walk.walk import Walk

    both = request.pair
    size = micro_batch_size(both.original, tokens.shape[1])
    walk = Walk(both.compressed, tokens, job.where, size, job.images).resumed(finished)
    return walk, None if request.aim == "weight" else Walk(both.original, tokens, job.where, size, job.images)


def _written(request: CompensateRequest, ranks: Mapping[str, int], writer: Writer) -> Model:
    """The source with what is in the partial folder."""
    distributed.wait()
    if request.options.merge:
        return open_model(writer.partial, request.options.trust_remote_code)
    base = str(request.out.resolve()) if request.method.splits else request.base
    text = peft.config_text(base, request.adapter_ranks(ranks), request.small_factors)
    writer.write_text(request.adapter_folder + peft.CONFIG, text)
    distributed.wait()
    if request.method.splits:
        return with_adapter(open_model(writer.partial, request.options.trust_remote_code), None)
    return with_adapter(replace(request.model, adapter=None), writer.partial)


def _scores(request: CompensateRequest, job: Job, repaired: Model) -> dict[str, Any]:
    """KL to the original on the windows that were held back, before and after, and what is wrong with it."""
    from compresskit.evaluation.language_modelling import score
    from compresskit.evaluation.scores import collapse_warning

    both, windows = request.pair, job.tokens[-HELD_BACK:]
    before, after = (score(model, windows, job.where, reference=both.original) for model in (both.compressed, repaired))
    warning = collapse_warning(after)
    if warning is None and (after.kl or 0.0) > WORSE * (before.kl or 0.0):
        warning = f"{request.out}: worse than its source, KL {before.kl:.4g} -> {after.kl:.4g} on held-back text; keep the source"
    return {"kl_before": before.kl, "kl_after": after.kl, "warning": warning}
