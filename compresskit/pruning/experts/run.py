"""Run a method of `prune` that removes experts: one walk, and a judgement on text that no step saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresskit import distributed
from compresskit.job import HELD_BACK, Job, run_request
from compresskit.models.load import open_model
from compresskit.pruning.experts.method import ExpertsMethod
from compresskit.pruning.experts.request import ExpertsRequest, open_request
from compresskit.stages import Options


def remove_experts(method: ExpertsMethod, source_name: str, out: Path, options: Options, quiet: bool = True) -> dict[str, Any]:
    """Remove experts of a checkpoint folder's model, into another folder.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; `out` is then as it was before.
    """
    return run_request(lambda: open_request(method, source_name, out, options), _remove, quiet)


def _remove(request: ExpertsRequest, job: Job) -> dict[str, Any]:
    from compresskit.evaluation.language_modelling import score
    from compresskit.evaluation.scores import collapse_warning
    from compresskit.pruning.experts.walk import prune_blocks
    from compresskit.walk.walk import Walk

    model = request.model
    writer = job.writer(request.outputs(), {"blocks": []})
    tokens = job.tokens[:-HELD_BACK] if request.walks else job.tokens[:0]
    prune_blocks(request, Walk(model, tokens, job.where, images=job.images), writer, job.bars)
    distributed.wait()
    written = open_model(writer.partial, request.options.trust_remote_code)
    scores = score(written, job.tokens[-HELD_BACK:], job.where, reference=model)
    summary = {
        "experts_removed": request.count - request.kept,
        "experts_kept": request.kept,
        "kl_held_back": scores.kl,
        "top1_held_back": scores.top1_agreement,
        "warning": collapse_warning(scores),
    }
    job.commit(writer, summary)
    before = model.checkpoint.parameters, model.checkpoint.bytes
    return job.result(before, writer.written) | summary
