"""State of a run in OUT/run.json: every step's key and result, written before the next step begins. No torch.

A step's key is the SHA-256 of its settings, the contents of its inputs and the tool's version. Before a step starts, any
existing folder of its name is removed, and its own folder appears atomically. A started step has therefore finished if and
only if its folder exists, so a run that is killed before it records the result does not repeat the step.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresskit.checkpoint import manifest, source
from compresskit.checkpoint.folder import NEW, partial_folder, write_whole
from compresskit.checkpoint.reader import read_json, sha256
from compresskit.errors import RequestError
from compresskit.recipe.steps import REFERENCE, RUN_DECIDES, STEP_NAME, Step, resolved

FILE = "run.json"
LOCK = ".lock"
FORMAT_VERSION = 1
READ_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".model", ".jinja", ".py")
"""Suffixes of files that a stage may read from a model or data folder."""
NOT_IN_KEY = (*RUN_DECIDES, "gate")
"""Not part of the key: a changed limit is checked against the existing report."""


@dataclass
class State:
    """State of the steps, by name: {"key", "status": "running" or "done", "result"}."""

    out: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Hashes of the inputs, computed once per run."""

    def folder(self, name: str) -> Path:
        """Output folder of a step."""
        return self.out / name

    def output(self, name: str) -> Path:
        """Output of a step: its folder, or the path that it names if it had nothing to do and wrote none."""
        folder = self.folder(name)
        result = self.steps.get(name, {}).get("result") or {}
        return folder if folder.is_dir() or "output" not in result else Path(result["output"])

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
                found = [Path(part).expanduser() for part in text.split("+") if _exists(part)]
                self.digests[text] = "".join(digest(path) for path in found)
        return self.digests[text] or None

    def is_done(self, step: Step, key: str) -> bool:
        """Whether the step has finished with this key and its output is unchanged."""
        found = self.steps.get(step.name)
        folder = self.output(step.name)
        if found is None or found["key"] != key or not folder.is_dir():
            return False
        if not step.writes_model:
            return (folder / "report.json").is_file()
        recorded = read_json(folder / manifest.NAME) if (folder / manifest.NAME).is_file() else {}
        return not manifest.changed_files(folder, recorded)

    def begin(self, step: Step, key: str) -> bool:
        """Make room for the step and record that it is running.

        Returns:
            Whether an interrupted run of the same request may have left partial output.

        Raises:
            RequestError: a folder that does not belong to this run is in the way.
        """
        found = self.steps.get(step.name)
        folder = self.folder(step.name)
        if found is None and folder.exists():
            raise RequestError(
                f"{folder}: is in the way of step {step.name!r} and not of this run; move it, or choose another OUT"
            )
        shutil.rmtree(folder, ignore_errors=True)
        partial = partial_folder(folder)
        goes_on = found is not None and found["key"] == key and found["status"] == "running"
        if not goes_on:
            shutil.rmtree(partial, ignore_errors=True)
        self.steps[step.name] = {"key": key, "status": "running", "result": None}
        self.save()
        return goes_on

    def finish(self, step: Step, result: dict[str, Any]) -> None:
        """Record that the step has finished."""
        self.steps[step.name] |= {"status": "done", "result": json.loads(json.dumps(result))}
        self.save()


def _texts(step: Step) -> list[str]:
    found: list[str] = []
    for settings in (step.method, step.options):
        if settings is not None:
            resolved(settings, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def _exists(text: str) -> bool:
    try:
        return bool(text) and Path(text).expanduser().exists()
    except OSError:  # the text is too long for a file name
        return False


def digest(path: Path) -> str:
    """SHA-256 of a file, or over the names and hashes of a folder's readable files; timestamps are ignored."""
    if path.is_file():
        return sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in READ_SUFFIXES)
    return manifest.fingerprint({str(file.relative_to(path)): sha256(file) for file in files})


def _check_names(path: Path, found: dict[str, Any]) -> None:
    """Refuse step names that a recipe could not have given: they become folders that are written, read and removed."""
    for name in found.get("steps", {}):
        if not STEP_NAME.fullmatch(name):
            raise RequestError(f"{path}: names a step {name!r}, which is no name of one; restore the file, or choose another OUT")


def open_state(out: Path, overwrite: bool) -> State:
    """Open the state of a run's folder, or create it; raises RequestError if the folder is something else."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out}: is a file, not a folder; choose another path")
    state = State(out)
    path = out / FILE
    if path.is_file() and not overwrite:
        found = read_json(path)
        _check_names(path, found)
        if found.get("format_version") != FORMAT_VERSION:
            raise RequestError(f"{path}: written by another version of compresskit; choose another OUT, or pass --overwrite")
        state.steps = found["steps"]
    elif path.is_file():
        found = read_json(path)
        _check_names(path, found)
        for name in found["steps"]:
            shutil.rmtree(state.folder(name), ignore_errors=True)
            shutil.rmtree(partial_folder(state.folder(name)), ignore_errors=True)
        path.unlink()
    elif out.exists() and any(path.name not in (LOCK, FILE + NEW) for path in out.iterdir()):
        raise RequestError(f"{out}: exists already and is no run's folder; choose another OUT")
    return state
