"""Run a method of `prune` that removes experts: one walk, and a judgement on text that no step saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresskit.job import HELD_BACK, Job, run_request
from compresskit.pruning.experts.method import ExpertsMethod
from compresskit.pruning.experts.request import ExpertsRequest, open_request
from compresskit.pruning.parts import judged
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
    from compresskit.pruning.experts.walk import prune_blocks
    from compresskit.walk.walk import Walk

    writer = job.writer(request.outputs(), {"blocks": []})
    walk = Walk(request.model, job.tokens[:-HELD_BACK], job.where, images=job.images)
    prune_blocks(request, walk, writer, job.bars)
    summary = {"experts_removed": request.count - request.kept, "experts_kept": request.kept}
    return judged(request, job, writer, summary)
