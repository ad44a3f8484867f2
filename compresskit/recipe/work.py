"""The work of one step: what it takes, with every reference resolved, and the doing of it. No torch until then.

A `Work` is all that another process needs to do a step, on this machine or on another that sees the same folders.
"""

from __future__ import annotations

import gc
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from compresskit.checkpoint.folder import settle
from compresskit.checkpoint.kinds import Stated
from compresskit.checkpoint.manifest import finished_result
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import storing, write_whole
from compresskit.checkpoint.work_folder import MANIFEST, WorkFolder
from compresskit.machine.memory import release_freed_memory, restart_peak
from compresskit.methods import runner, stage_of
from compresskit.recipe.results import check_step
from compresskit.recipe.state import REPORT, State, output_digest
from compresskit.recipe.steps import REFERENCE, Step, resolved


@dataclass(frozen=True)
class Work:
    """What a step has to do."""

    step: Step
    method: BaseModel | None
    """As in `step`, with folders for names of steps; None for stages without methods."""
    options: BaseModel
    """As in `step`, with folders for names of steps."""
    sources: str | list[str]
    """The model that it reads, or several for stages that merge."""
    folder: Path
    """The step's own."""
    goes_on: bool
    """Whether an interrupted run of the same request may have left unfinished output."""
    replaces: str | None
    """Digest of the older output (state.py), None if there is none."""


def work_of(step: Step, state: State, goes_on: bool) -> Work:
    """The work of a step whose references are done, and that the state says is running."""

    def folders(text: str) -> str:
        return REFERENCE.sub(lambda found: str(state.output(found[1])), text)

    options = resolved(step.options, folders)
    method = resolved(step.method, folders) if step.method else None
    sources: str | list[str] = [folders(each) for each in step.sources]
    if len(sources) == 1 and not getattr(stage_of(step.stage, step.method_name or ""), "several", False):
        sources = sources[0]
    replaces = state.steps[step.name].get("replaces")
    return Work(step, method, options, sources, state.folder(step.name), goes_on, replaces)


def do(work: Work, quiet: bool) -> dict[str, Any]:
    """Do a step; the folder has its output afterwards.

    Returns:
        The dictionary that the stage's `--json` prints.

    Raises:
        CompresskitError: the stage's own errors, see errors.py for the kinds.
    """
    step, folder = work.step, work.folder
    run = runner(step.stage, step.method_name or "")
    gc.collect()  # fine-tuning leaves reference cycles that keep the source's weights mapped until they are collected
    release_freed_memory()
    restart_peak()
    if not step.writes_model:
        return _reported(work, run, quiet)
    decided = {"resume": work.goes_on, "overwrite": folder.is_dir()}
    known = type(work.options).model_fields
    options = work.options.model_copy(update={key: value for key, value in decided.items() if key in known})
    return _written(work, run, folder, options, quiet)


def _written(work: Work, run: Any, out: Path, options: Any, quiet: bool) -> dict[str, Any]:
    """Run the stage, which writes `out`; some stages have no method."""
    method = () if work.method is None else (work.method,)
    result: dict[str, Any] = run(*method, work.sources, out, options, quiet=quiet)
    return result


def _reported(work: Work, run: Any, quiet: bool) -> dict[str, Any]:
    """Do a step that writes a report, and perhaps one file, but no model."""
    folder, file = work.folder, work.step.file
    if not file:
        report: dict[str, Any] = run(work.sources, work.options, quiet=quiet)
    with storing(folder):
        folder.mkdir(exist_ok=True)
    if file:
        options = work.options.model_copy(update={"overwrite": True})
        report = _written(work, run, folder / file, options, quiet)
    write_whole(folder / REPORT, json.dumps(report, indent=1) + "\n")
    return report


def do_again(work: Work, quiet: bool) -> dict[str, Any]:
    """Do a step that a process which died may have begun, or even finished, since the state said that it is running.

    Returns:
        The dictionary that the stage's `--json` prints; the time of a step that had finished is unknown.

    Raises:
        CompresskitError: the stage's own errors, see errors.py for the kinds.
    """
    settle(work.folder)
    if output_digest(work.folder) not in (None, work.replaces):
        return recovered_result(work.step, work.folder)
    begun = WorkFolder(work.folder).is_worth_keeping
    return do(replace(work, goes_on=work.goes_on or begun), quiet)


def recovered_result(step: Step, folder: Path) -> dict[str, Any]:
    """Reconstruct the result of a step that finished just before its run was killed, from its folder; its time is unknown."""
    file = folder / (MANIFEST if step.writes_model else REPORT)
    result = finished_result(folder) if step.writes_model else read_json(file)
    check_step(result, step.name, Stated(file, remedy=f"remove {folder}, and run again"))
    return result
