"""Run the recover stage: select, fine-tune, merge or keep the adapter, report.

Intermediate results stay in `OUT.partial/training/` until the output is complete: the selection, the original's
predictions and the training checkpoints. `--resume` continues from there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from compresskit import distributed
from compresskit.checkpoint.folder import held, open_training
from compresskit.checkpoint.manifest import check_unchanged
from compresskit.checkpoint.results import time_and_memory
from compresskit.checkpoint.work_folder import WorkFolder
from compresskit.job import finished_request
from compresskit.machine.device import choose_device
from compresskit.machine.progress import ProgressBars, timed
from compresskit.recovery.data.reading import read_data
from compresskit.recovery.method import Selection, SelectionMethod
from compresskit.recovery.options import RecoverOptions
from compresskit.recovery.request import open_request
from compresskit.recovery.selection.files import read_selection, write_selection
from compresskit.recovery.selection.shown import shown_samples
from compresskit.recovery.work import Recovery


def recover(method: SelectionMethod, source_name: str, out: Path, options: RecoverOptions, quiet: bool = True) -> dict[str, Any]:
    """Select data and fine-tune a compressed checkpoint on it.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; `out` is then as it was before.
    """
    started = time.monotonic()
    request = distributed.after_first(lambda: open_request(method, source_name, out, options))
    data = read_data(request)
    where = choose_device(options.device, options.dtype, request.model.checkpoint.dtypes, options.trust_remote_code)
    with held(out, options.overwrite, options.resume) as work, ProgressBars(quiet) as bars:
        if options.verify and distributed.is_first():
            for each in request.stores:
                check_unchanged(each)
        recovery = Recovery(request, data, where, work, bars)
        key = recovery.key
        result = distributed.from_first(lambda: finished_request(request, key)) or _recover(recovery)
    if options.show:
        result |= {"shown": shown_samples(request, data)}
    shares = {what: round(value, 2) for what, value in recovery.seconds.items()}
    return result | {"time_shares": shares} | time_and_memory(started)


def _recover(recovery: Recovery) -> dict[str, Any]:
    """Do the work, after all checks."""
    request = recovery.request
    distributed.from_first(lambda: open_training(WorkFolder(request.out), recovery.key, request.options.resume))
    selection = _select(recovery)
    training, facts = None, {**recovery.data.facts, "selected": len(selection.choices), **selection.facts}
    if not recovery.request.options.select_only:
        from compresskit.recovery.losses import losses_before
        from compresskit.recovery.training.finetune import fine_tune

        before = losses_before(recovery)
        training = fine_tune(recovery, selection)
        facts |= {**training.facts, "held_back_before": before}
    from compresskit.recovery.output import write

    return write(recovery, selection, training, facts)


def _select(recovery: Recovery) -> Selection:
    """Select samples with the method, or read an interrupted run's selection; all ranks take what the first has."""
    workspace = recovery.request.workspace
    earlier = distributed.from_first(lambda: read_selection(workspace))
    if earlier is not None:
        return earlier
    if not recovery.request.options.data:
        return Selection([])
    from compresskit.recovery.selection.pool import open_pool

    with timed(recovery.seconds, "selection"):
        own = recovery.request.method.select(open_pool(recovery))
    selection = distributed.from_first(lambda: own)
    distributed.from_first(lambda: write_selection(workspace, selection))
    return selection
