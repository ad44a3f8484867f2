"""The export stage at work."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from compresskit.checkpoint import source
from compresskit.checkpoint.file_out import check_file_out
from compresskit.checkpoint.manifest import check_unchanged, manifest
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.whole_files import whole_file
from compresskit.checkpoint.work_folder import check_space
from compresskit.exporting.method import ExportMethod
from compresskit.exporting.planned import facts
from compresskit.exporting.request import ExportOptions
from compresskit.formats.peft import CONFIG
from compresskit.machine.progress import ProgressBars
from compresskit.methods import name_of
from compresskit.models.load import open_any
from compresskit.models.model import Model

LEFT_OUT = "the adapter that repairs it is a file of its own: compresskit export {method} {folder} ADAPTER{ending}"


def export(method: ExportMethod, source_name: str, out: Path, options: ExportOptions, quiet: bool = True) -> dict[str, Any]:
    """Write a checkpoint as one file, or an adapter folder as a file for its base.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; what cannot be exported is refused before any work, and after any error
            OUT is as it was.
    """
    started = time.monotonic()
    check_file_out(out, method.ending, method.magic, options.overwrite)
    folder = source.resolve(source_name)
    model = open_any(str(folder))
    name = name_of("export", method)
    is_adapter = (folder / CONFIG).is_file() and not (folder / "config.json").is_file()
    planned = method.adapter_file(model) if is_adapter else method.model_file(model)
    if model.adapter is not None and not is_adapter:
        note = LEFT_OUT.format(method=name, folder=model.adapter.folder, ending=method.ending)
        planned = replace(planned, notes=[*planned.notes, note])
    check_space(out, planned.bytes)
    store = _store(model, is_adapter)
    if options.verify:
        check_unchanged(store)
    settings = {"method": name, **method.model_dump()}
    text = json.dumps(manifest("export", settings, store, {}, {}))
    with whole_file(out) as path, ProgressBars(quiet) as bars:
        errors = method.write(planned, path, text, lambda done: bars("exporting", done, len(planned.tensors)))
    before, after = (store.parameters, store.bytes), (planned.parameters, out.stat().st_size)
    if not is_adapter:
        before = replace(model, adapter=None).parameters, store.bytes
    return stage_result("export", settings, out, store, before, after) | facts(planned, errors) | time_and_memory(started)


def _store(model: Model, is_adapter: bool) -> Checkpoint:
    """The opened folder that is exported."""
    return model.adapter.store if model.adapter is not None and is_adapter else model.checkpoint
