"""State of a run in OUT/run.json: every step's key and result, written before the next step begins. No torch.

A step's key is the SHA-256 of its settings, the contents of its inputs and the tool's version. A step's old output stays
until the new one takes its place in one step. A step that is recorded as running has therefore finished if and only if it
has an output, and another than the recorded one: a run that is killed before it records the result does not repeat the step.
What is removed goes in one step too, and the work folder of a step is of the recorded key, or empty.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresskit.checkpoint import manifest, source
from compresskit.checkpoint.folder import discard, remove, settle
from compresskit.checkpoint.kinds import Stated
from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.small_files import read_json, shown
from compresskit.checkpoint.whole_files import NEW, write_whole
from compresskit.checkpoint.work_folder import check_name, is_ours, manifest_digest
from compresskit.errors import RequestError
from compresskit.recipe.results import check_step
from compresskit.recipe.steps import LONGEST_NAME, REFERENCE, RUN_DECIDES, STEP_NAME, Step, resolved

FILE = "run.json"
LOCK = ".lock"
FORMAT_VERSION = 1
READ_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".model", ".jinja", ".py")
"""Suffixes of files that a stage may read from a model or data folder."""
NOT_IN_KEY = (*RUN_DECIDES, "gate", "verify", "threads")
"""Not part of the key: a changed limit is checked against the existing report."""
REPORT = "report.json"
REPORT_FILES = (REPORT, REPORT + NEW)
"""What a step that writes no model has in its folder: its report, and what a kill left of one."""
EXPORTED = (".gguf", ".ckz")
"""Endings of the files that export and pack steps write beside their report."""
RUNNING, DONE, OUTDATED = "running", "done", "outdated"
"""Status of a step; outdated: asked to be done again, by a run that starts over."""


@dataclass
class State:
    """State of a run's steps."""

    out: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By name: {"key", "status", "result", "replaces": digest of the older output, None if there was none}."""
    digests: dict[str, str] = field(default_factory=dict)
    """Hashes of the inputs, computed once per run."""

    def folder(self, name: str) -> Path:
        """Output folder of a step."""
        return self.out / name

    def output(self, name: str) -> Path:
        """Output of a step: its folder, or the path that it names if it had nothing to do and wrote none."""
        folder = self.folder(name)
        named = (self.steps.get(name, {}).get("result") or {}).get("output") or ""
        return folder if folder.is_dir() or not exists(named) else Path(named)

    def save(self) -> None:
        """Write run.json atomically."""
        found = {"format_version": FORMAT_VERSION, "steps": self.steps}
        write_whole(self.out / FILE, json.dumps(found, indent=1) + "\n")

    def key(self, step: Step, earlier: dict[str, str]) -> str:
        """Compute the step's key; `earlier`: keys of the earlier steps, by name."""
        parts: list[Any] = [step.stage, step.method_name]
        parts += [settings.model_dump(exclude=set(NOT_IN_KEY)) for settings in (step.method, step.options) if settings]
        inputs = {name: earlier[name] for name in step.references}
        texts = [*step.sources, *(text for text in _texts(step) if not REFERENCE.search(text))]
        files = {text: self._digest(text, text in step.sources) for text in texts if not REFERENCE.search(text)}
        return manifest.fingerprint("step", parts, list(step.sources), inputs, {k: v for k, v in files.items() if v})

    def _digest(self, text: str, must_exist: bool) -> str | None:
        """SHA-256 of the model, folder or files (joined by +) that a text names; None if it names nothing on this disk."""
        if text not in self.digests:
            if must_exist or text.startswith("demo:"):
                self.digests[text] = digest(source.resolve(text))
            else:
                found = [Path(part).expanduser() for part in text.split("+") if exists(part)]
                self.digests[text] = "".join(digest(path) for path in found)
        return self.digests[text] or None

    def is_done(self, step: Step, key: str) -> bool:
        """Whether the step has finished with this key and its output is unchanged."""
        found = self.steps.get(step.name)
        folder = self.output(step.name)
        if found is None or found["key"] != key or found["status"] == OUTDATED or not folder.is_dir():
            return False
        if found["status"] == RUNNING and output_digest(self.folder(step.name)) in (None, found.get("replaces")):
            return False
        if not step.writes_model:
            return (folder / REPORT).is_file() and (not step.file or (folder / step.file).is_file())
        recorded = read_manifest(folder) or {}
        return not manifest.changed_files(folder, recorded)

    def begin(self, step: Step, key: str) -> bool:
        """Record that the step is running.

        Returns:
            Whether an interrupted run of the same request may have left unfinished output.

        Raises:
            RequestError: a folder that does not belong to this run is in the way.
        """
        found = self.steps.get(step.name)
        folder = self.folder(step.name)
        if found is None and os.path.lexists(folder):
            raise RequestError(
                f"{folder}: is in the way of step {step.name!r} and not of this run; move it, or choose another OUT"
            )
        goes_on = found is not None and found["key"] == key and found["status"] == RUNNING
        if goes_on:
            settle(folder)  # the old output may wait there to come back; afterwards, it would be taken for the new one
        else:
            discard(folder)  # of another key; once this one is recorded, a resumed run would take it up
        if folder.is_dir() and step.writes_model == any((folder / name).is_file() for name in REPORT_FILES):
            self._remove_output(step.name)  # under this name, another recipe had the other kind of step
        self.steps[step.name] = {"key": key, "status": RUNNING, "result": None, "replaces": output_digest(folder)}
        self.save()
        return goes_on

    def finish(self, step: Step, result: dict[str, Any]) -> None:
        """Record that the step has finished."""
        folder = self.folder(step.name)
        if step.writes_model and result.get("output") != str(folder) and folder.is_dir():
            self._remove_output(step.name)  # this time, the step had nothing to do
        found = {"key": self.steps[step.name]["key"], "status": DONE, "result": json.loads(json.dumps(result))}
        self.steps[step.name] = found
        self.save()

    def clear(self, names: Sequence[str]) -> None:
        """Remove the outputs of steps that were asked to be done again and are none of `names`, and what was left unfinished."""
        for name in [name for name, found in self.steps.items() if found["status"] == OUTDATED and name not in names]:
            self._remove_output(name)
            discard(self.folder(name))
            del self.steps[name]
            self.save()
        for name in names:
            discard(self.folder(name))

    def _remove_output(self, name: str) -> None:
        """Remove a step's folders if they hold a stage's output or a report and nothing else; raises RequestError otherwise."""
        folder = self.folder(name)
        if not os.path.lexists(folder):
            return
        if not is_ours(folder) and not _is_report(folder):
            raise RequestError(f"{folder}: holds what no step wrote, so it is not removed; move it, or choose another OUT")
        remove(folder)


def _is_report(folder: Path) -> bool:
    """Whether a folder holds a report and an exported file, or what a kill left of them, and nothing else."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(_is_of_report(folder, path) and path.is_file() and not path.is_symlink() for path in folder.iterdir())


def _is_of_report(folder: Path, path: Path) -> bool:
    """Whether a file is a report, or an exported file under its step's name, whole or not."""
    exported = any(path.name.startswith(folder.name + ending) for ending in EXPORTED)
    return path.name in REPORT_FILES or (exported and path.suffix in (*EXPORTED, NEW))


def output_digest(folder: Path) -> str | None:
    """What tells one output of a step from another: the SHA-256 of its manifest or report; None if there is none."""
    report = folder / REPORT
    return manifest_digest(folder) or (sha256(report) if report.is_file() else None)


def _texts(step: Step) -> list[str]:
    found: list[str] = []
    for settings in (step.method, step.options):
        if settings is not None:
            resolved(settings, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def exists(text: str) -> bool:
    """Whether a text names a file or a folder of this disk."""
    try:
        return bool(text) and Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a file name, a home that nobody has, a null byte
        return False


def digest(path: Path) -> str:
    """SHA-256 of a file, or over the names and hashes of a folder's readable files; timestamps are ignored."""
    if path.is_file():
        return sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in READ_SUFFIXES)
    return manifest.fingerprint({str(file.relative_to(path)): sha256(file) for file in files})


def _checked_steps(path: Path, found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Check the content of a run.json. Names of steps become folders that are written and removed, as those of a recipe do.

    Returns:
        The steps, by name.

    Raises:
        RequestError: a name is none that a recipe could have given, or an entry is no step's.
    """
    steps = found.get("steps")
    if found.get("format_version") != FORMAT_VERSION or not isinstance(steps, dict):
        raise RequestError(f"{path}: written by another version of compresskit; choose another OUT")
    for name, step in steps.items():
        if not STEP_NAME.fullmatch(name) or len(name) > LONGEST_NAME:
            raise RequestError(
                f"{path}: names a step {shown(name)}, which is no name of one; restore the file, or choose another OUT"
            )
        if not isinstance(step, dict) or not {"key", "status", "result"} <= step.keys():
            raise RequestError(f"{path}: step {name!r} has no key, status and result; restore the file, or choose another OUT")
        if not isinstance(step["result"], dict | None) or step["status"] not in (RUNNING, DONE, OUTDATED):
            raise RequestError(f"{path}: step {name!r} has no status of one; restore the file, or choose another OUT")
        if step["result"] is not None:
            check_step(step["result"], name, Stated(path, remedy="restore the file, or choose another OUT"))
    return steps


def open_state(out: Path, overwrite: bool) -> State:
    """Open the state of a run's folder, or create it.

    Returns:
        The state; with `overwrite`, all its steps count as asked to be done again.

    Raises:
        RequestError: the folder is something else.
    """
    check_name(out)
    if os.path.lexists(out) and not out.is_dir():
        raise RequestError(f"{out}: is a file, not a folder; choose another path")
    state = State(out)
    path = out / FILE
    if path.is_file():
        state.steps = _checked_steps(path, read_json(path, finite=False))
        if overwrite:
            for found in state.steps.values():
                found["status"] = OUTDATED
    elif out.exists() and any(path.name not in (LOCK, FILE + NEW) for path in out.iterdir()):
        raise RequestError(f"{out}: exists already and is no run's folder; choose another OUT")
    return state
