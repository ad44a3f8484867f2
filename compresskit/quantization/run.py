"""Run the quantize stage: grids, the walk or the two streams, and a final check for a collapsed model.

The check is the KL divergence from the original on held-back calibration windows.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit import distributed
from compresskit.checkpoint.writer import Writer
from compresskit.formats import peft
from compresskit.job import HELD_BACK, Job, run_request
from compresskit.models.load import open_model, with_adapter
from compresskit.models.model import Model
from compresskit.quantization.block_method import BlockMethod
from compresskit.quantization.method import GridMethod, QuantizeMethod
from compresskit.quantization.request import QuantizeRequest, open_request
from compresskit.quantization.scaling import scaling_summary
from compresskit.stages import Options

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from compresskit.evaluation.scores import Scores

MIXED_WINDOWS = 4
"""Windows on which mixed precision measures what each block loses; of a method that needs no text, those held back."""


def quantize(method: QuantizeMethod, source_name: str, out: Path, options: Options, quiet: bool = True) -> dict[str, Any]:
    """Quantise a checkpoint folder into another one.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; `out` is then as it was before.
    """
    return run_request(lambda: open_request(method, source_name, out, options), quantize_into, quiet)


def quantize_into(request: QuantizeRequest, job: Job, **known: Any) -> dict[str, Any]:
    """Do a checked request in a job, its own or that of a stage which made it; `known`: facts for the manifest."""
    from compresskit.evaluation.language_modelling import score
    from compresskit.quantization import expert_floor

    model = request.model
    request, bits = _with_bits(request, job)
    writer = job.writer(request.outputs(), {"blocks": [], **bits, **known})
    finished = dict.fromkeys(writer.done, _written(request, writer)) if writer.done else {}
    _walk(request, job, finished, writer)
    distributed.wait()
    scores = score(_written(request, writer), job.tokens[-HELD_BACK:], job.where, reference=model)
    blocks = writer.facts["blocks"]
    summary = _summary(request, scores) | scaling_summary(blocks) | expert_floor.summary(blocks)
    job.commit(writer, summary)
    before = model.parameters, model.checkpoint.bytes
    return job.result(before, (model.parameters, writer.written[1])) | summary


def _with_bits(request: QuantizeRequest, job: Job) -> tuple[QuantizeRequest, dict[str, Any]]:
    """(the request with each block's own grid, facts about it): measured, or what an interrupted run had measured."""
    method, model = request.method, request.model
    if not isinstance(method, GridMethod) or len(method.levels) == 1:
        return request, {}
    from compresskit.quantization.mixed import allocate_bits, block_losses
    from compresskit.walk.walk import Walk

    if job.progress:
        facts = {key: job.progress["facts"][key] for key in ("bits", "losses")}
    else:
        walk = Walk(model, job.tokens[:MIXED_WINDOWS], job.where, images=job.images)
        losses = block_losses(request, walk, [method.scheme_of(model, bits) for bits in method.levels], job.bars)
        sizes = [0] * model.block_count
        for name in request.schemes:
            sizes[model.block_of(name)] += math.prod(model.linear_shape(name))
        facts = {"bits": allocate_bits(losses, sizes, method.average), "losses": losses}
    return replace(request, bits=tuple(facts["bits"])), facts


def _written(request: QuantizeRequest, writer: Writer) -> Model:
    """What is in the partial folder; an adapter gets its configuration first."""
    if request.rank:
        ranks = dict.fromkeys(request.schemes, request.rank)
        text = peft.config_text(str(request.out.resolve()), ranks, request.factor_dtype == peft.EIGHT_BITS)
        writer.write_text(f"{peft.FOLDER}/{peft.CONFIG}", text)
        distributed.wait()
    return with_adapter(open_model(writer.partial, request.options.trust_remote_code), None)


def _walk(request: QuantizeRequest, job: Job, finished: Mapping[int, Model], writer: Writer) -> None:
    """Walk the model once, or the original and the result side by side."""
    from compresskit.quantization.guide import guide_of
    from compresskit.quantization.sequential import quantize_blocks
    from compresskit.walk.walk import Walk

    tokens = job.tokens[:-HELD_BACK]
    if isinstance(request.method, BlockMethod):
        _two_streams(request, request.method, job, finished, writer)
    else:
        walk = Walk(request.model, tokens, job.where, images=job.images)
        with job.work.scratch() as scratch:
            guided = request.method.guide_rows > 0 and len(writer.done) < request.model.block_count
            guide = guide_of(request, walk, job.where, scratch, job.bars) if guided else _none
            quantize_blocks(request, walk.resumed(finished), writer, job.bars, guide)


def _two_streams(request: QuantizeRequest, method: BlockMethod, job: Job, finished: Mapping[int, Model], writer: Writer) -> None:
    from compresskit.quantization.two_streams import Saliencies, quantize_blocks
    from compresskit.walk.cost import micro_batch_size
    from compresskit.walk.walk import Walk

    tokens: Tensor = job.tokens[:-HELD_BACK]
    with job.work.scratch() as scratch:
        saliencies: Saliencies = _none
        if method.fisher_windows:
            from compresskit.quantization.apiq.fisher import fisher_diagonals

            part = Walk(request.model, tokens, job.where, 1, job.images).take(method.fisher_windows)
            saliencies = fisher_diagonals(part, list(request.schemes) if method.holds_by_fisher else [], scratch, job.bars)
        size = min(method.windows_at_once, micro_batch_size(request.model, tokens.shape[1]))
        original, compressed = (Walk(request.model, tokens, job.where, size, job.images).held_by_all() for _ in range(2))
        quantize_blocks(request, method, (original, compressed.resumed(finished)), saliencies, writer, job.bars)


def _none(index: int) -> dict[str, Any]:
    """No saliencies and no guide, for any block."""
    return {}


def _summary(request: QuantizeRequest, scores: Scores) -> dict[str, Any]:
    from compresskit.evaluation.scores import collapse_warning

    return {
        "bits_per_weight": request.stored_bits,
        "kl_held_back": scores.kl,
        "top1_held_back": scores.top1_agreement,
        "dense_linears": [name for name in request.model.linears if name not in request.schemes],
        "warning": collapse_warning(scores),
    }
