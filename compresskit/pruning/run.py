"""Run the prune stage: widths for every block, then the pruning walk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresskit.job import Job, run_request
from compresskit.models import layouts
from compresskit.models.load import open_model
from compresskit.pruning.method import PruneMethod
from compresskit.pruning.request import PruneRequest, open_request, sparsity
from compresskit.stages import Options


def prune(method: PruneMethod, source_name: str, out: Path, options: Options, quiet: bool = True) -> dict[str, Any]:
    """Prune a checkpoint folder into another one.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; `out` is then as it was before.
    """
    return run_request(lambda: open_request(method, source_name, out, options), _prune, quiet)


def _prune(request: PruneRequest, job: Job) -> dict[str, Any]:
    from compresskit.pruning.allocation import Allocated, allocate
    from compresskit.pruning.walk import prune_blocks
    from compresskit.walk.walk import Walk

    model = request.model
    walk = Walk(model, job.tokens, job.where, images=job.images)
    if job.progress:
        allocated = Allocated(job.progress["facts"]["widths"], job.progress["facts"]["importances"])
    else:
        allocated = allocate(request.method, walk, job.bars)
    outputs = request.outputs(allocated.widths)
    stored = layouts.stored_widths(model, allocated.widths, request.method.layout)
    writer = job.writer(outputs, {"widths": allocated.widths, "importances": allocated.importances, "blocks": []})
    if writer.done:
        walk = walk.resumed(dict.fromkeys(writer.done, open_model(writer.partial, request.options.trust_remote_code)))
    prune_blocks(request, walk, (allocated.widths, stored), writer, job.bars)
    summary = {
        "sparsity_achieved": sparsity(model, allocated.widths),
        "layout": "uniform" if layouts.is_uniform(model, stored) else request.method.layout,
        "output_bias": request.output_bias,
    }
    job.commit(writer, summary)
    before = model.checkpoint.parameters, model.checkpoint.bytes
    return job.result(before, writer.written) | {"widths": allocated.widths} | summary
