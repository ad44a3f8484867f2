"""Run `prune depth`: choose the blocks, fold and copy, and judge the result on text that no step saw."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.job import HELD_BACK, Job, run_request
from compresskit.pruning.depth.method import Depth
from compresskit.pruning.depth.request import ANGLE_WINDOWS, LOSS_WINDOWS, DepthRequest, open_request
from compresskit.pruning.parts import judged
from compresskit.stages import Options

if TYPE_CHECKING:
    from compresskit.pruning.depth.choice import Chosen

WINDOWS_AT_ONCE = 2
"""Of the refit: a block's trial runs are on one micro-batch (`fold.scale_of`), and so cost little."""


def remove(method: Depth, source_name: str, out: Path, options: Options, quiet: bool = True) -> dict[str, Any]:
    """Remove blocks of a checkpoint folder's model, into another folder.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; `out` is then as it was before.
    """
    return run_request(lambda: open_request(method, source_name, out, options), _remove, quiet)


def _remove(request: DepthRequest, job: Job) -> dict[str, Any]:
    from compresskit.models.same_blocks import check_same_blocks
    from compresskit.pruning.depth.walk import remove_blocks
    from compresskit.walk.walk import Walk

    model = request.model
    if job.progress:
        removed, facts = job.progress["facts"]["removed_blocks"], {}
    else:
        removed, figures = _chosen(request, job)
        facts = {"removed_blocks": removed, "choice": figures, "blocks": []}
        check_same_blocks(model, removed)
    writer = job.writer(request.outputs(removed), facts)
    walk = Walk(model, job.tokens[:-HELD_BACK], job.where, WINDOWS_AT_ONCE, job.images)
    remove_blocks(request, walk, removed, writer, job.bars)
    summary = {
        "blocks_removed": len(removed),
        "blocks_kept": model.block_count - len(removed),
        "refitted_blocks": [facts["source_block"] for facts in writer.facts["blocks"] if "refitted" in facts],
    }
    return judged(request, job, writer, summary) | {"removed_blocks": removed}


def _chosen(request: DepthRequest, job: Job) -> Chosen:
    """The blocks that go, measured on the first calibration windows."""
    from compresskit.pruning.depth import choice
    from compresskit.walk.walk import Walk

    method, is_greedy = request.method, request.method.choose == "loss"
    windows = min(LOSS_WINDOWS if is_greedy else ANGLE_WINDOWS, len(job.tokens) - HELD_BACK)
    walk = Walk(request.model, job.tokens[:windows], job.where, micro_batch=1, images=job.images)
    if is_greedy:
        return choice.by_loss(walk, request.count, request.allows, job.bars, method.candidates)
    measure = choice.by_angle if method.choose == "angle" else choice.by_run
    return measure(walk, request.count, request.allows, job.bars)
