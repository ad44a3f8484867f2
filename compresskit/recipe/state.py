"""What a run has done so far, in OUT/run.json: every step's key and result, written before the next step begins. No torch.

A step's key is the SHA-256 of its settings, of the contents of its inputs and of this tool's version. A stage's folder
appears under its final name whole or not at all, so a step that was started with a key, after the folder of that name was
removed, has finished exactly when the folder is there: a run that was killed between the two is not done again.
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
from compresskit.recipe.steps import REFERENCE, RUN_DECIDES, Step, resolved

FILE = "run.json"
LOCK = ".lock"
FORMAT_VERSION = 1
READ_SUFFIXES = (".safetensors", ".json", ".jsonl", ".parquet", ".txt", ".model", ".jinja", ".py")
"""Files of a model's or a data folder that a stage may read."""
NOT_IN_KEY = (*RUN_DECIDES, "gate")
"""A limit that changes is held against the report that is there already."""


@dataclass
class State:
    """The steps of a run, by name: {"key", "status": "running" or "done", "result"}."""

    out: Path
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    """Of the inputs, hashed once in a run."""

    def folder(self, name: str) -> Path:
        """Where a step writes."""
        return self.out / name

    def output(self, name: str) -> Path:
        """What a step gave: its folder, or what it names where it had nothing to do and wrote none."""
        folder = self.folder(name)
        result = self.steps.get(name, {}).get("result") or {}
        return folder if folder.is_dir() or "output" not in result else Path(result["output"])

    def save(self) -> None:
        """Replace run.json, whole."""
        found = {"format_version": FORMAT_VERSION, "steps": self.steps}
        write_whole(self.out / FILE, json.dumps(found, indent=1) + "\n")

    def key(self, step: Step, earlier: dict[str, str]) -> str:
        """The step's key; `earlier`: keys of the steps before it, by name."""
        parts: list[Any] = [step.stage, step.method_name]
        parts += [settings.model_dump(exclude=set(NOT_IN_KEY)) for settings in (step.method, step.options) if settings]
        inputs = {name: earlier[name] for name in step.references}
        texts = [*step.sources, *(text for text in _texts(step) if not REFERENCE.search(text))]
        files = {text: self._digest(text, text in step.sources) for text in texts if not REFERENCE.search(text)}
        return manifest.fingerprint("step", parts, list(step.sources), inputs, {k: v for k, v in files.items() if v})

    def _digest(self, text: str, must_exist: bool) -> str | None:
        """SHA-256 of what a text names: a model, a folder, or files joined by +; None where it names nothing on this disk."""
        if text not in self.digests:
            if must_exist or text.startswith("demo:"):
                self.digests[text] = digest(source.resolve(text))
            else:
                found = [Path(part).expanduser() for part in text.split("+") if _exists(part)]
                self.digests[text] = "".join(digest(path) for path in found)
        return self.digests[text] or None

    def is_done(self, step: Step, key: str) -> bool:
        """Whether the step has finished with this key, and its output is still what it was."""
        found = self.steps.get(step.name)
        folder = self.output(step.name)
        if found is None or found["key"] != key or not folder.is_dir():
            return False
        if not step.writes_model:
            return (folder / "report.json").is_file()
        recorded = read_json(folder / manifest.NAME) if (folder / manifest.NAME).is_file() else {}
        return not manifest.changed_files(folder, recorded)

    def begin(self, step: Step, key: str) -> bool:
        """Make room for the step and note that it runs.

        Returns:
            Whether the same request was interrupted and may have left a part.

        Raises:
            RequestError: a folder that is not of this run is in the way.
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
        """Note that the step has finished."""
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
    except OSError:  # a text too long for a file's name
        return False


def digest(path: Path) -> str:
    """SHA-256 of a file, or over the names and hashes of a folder's files that a stage may read; times play no part."""
    if path.is_file():
        return sha256(path)
    files = sorted(each for each in path.rglob("*") if each.is_file() and each.suffix in READ_SUFFIXES)
    return manifest.fingerprint({str(file.relative_to(path)): sha256(file) for file in files})


def open_state(out: Path, overwrite: bool) -> State:
    """The state of a run's folder, a new one where there is none yet; RequestError where the folder is something else."""
    if out.exists() and not out.is_dir():
        raise RequestError(f"{out}: is a file, not a folder; choose another path")
    state = State(out)
    path = out / FILE
    if path.is_file() and not overwrite:
        found = read_json(path)
        if found.get("format_version") != FORMAT_VERSION:
            raise RequestError(f"{path}: written by another version of compresskit; choose another OUT, or pass --overwrite")
        state.steps = found["steps"]
    elif path.is_file():
        for name in read_json(path)["steps"]:
            shutil.rmtree(state.folder(name), ignore_errors=True)
            shutil.rmtree(partial_folder(state.folder(name)), ignore_errors=True)
        path.unlink()
    elif out.exists() and any(path.name not in (LOCK, FILE + NEW) for path in out.iterdir()):
        raise RequestError(f"{out}: exists already and is no run's folder; choose another OUT")
    return state
