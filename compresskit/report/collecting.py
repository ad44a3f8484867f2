"""Collect a run's result and the manifests of its steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.small_files import inside, read_json, shown
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import RequestError
from compresskit.recipe.run import REPORT

PER_BLOCK = {"widths": "widths", "bits": "bits", "importances": "importance"}
"""Facts that list a number for each block, or several to add up, and what they are called here."""
ERRORS = {
    "relative_output_error": "output error",
    "start_error": "before training",
    "kept_error": "after training",
    "error": "output error",
    "error_before": "before the repair",
    "error_after": "after the repair",
}
"""Error facts of a block, and their labels."""


class Measured(NamedTuple):
    """An evaluate step and the step whose model it measured."""

    name: str
    of: str
    report: dict[str, Any]


def read_result(out: Path) -> dict[str, Any]:
    """Read the run's result; raises RequestError if there is none."""
    if not (out / REPORT).is_file():
        raise RequestError(f"{out}: holds no finished run ({REPORT} is missing); run a recipe into it first")
    found = read_json(out / REPORT)
    if "steps" not in found:
        raise RequestError(f"{out / REPORT}: is the report of one step; give the folder of the whole run")
    if not isinstance(found["steps"], dict):
        raise RequestError(f"{out / REPORT}: steps are {shown(found['steps'])}, expected reports by name; run the recipe again")
    for name, step in found["steps"].items():
        inside(out, name, out / REPORT)
        if step is not None and not (isinstance(step, dict) and _names_folders(step)):
            raise RequestError(f"{out / REPORT}: says of {name} {shown(step)}, expected a step's report; run the recipe again")
    return found


def _names_folders(step: Mapping[str, Any]) -> bool:
    """Whether a step's report names its source, or the sources of a merge, and its adapter as texts."""
    source = step.get("source", "")
    texts = [*(source if isinstance(source, list) else [source]), step.get("adapter") or ""]
    return all(isinstance(text, str) for text in texts)


def manifests(out: Path, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Manifest of every step that wrote a model, by name."""
    found = {name: read_manifest(out / name) for name, step in result["steps"].items() if step is not None}
    return {name: manifest for name, manifest in found.items() if manifest is not None}


def measured(result: Mapping[str, Any]) -> list[Measured]:
    """All evaluations, in order."""
    found = []
    for name, step in result["steps"].items():
        if step is not None and step.get("stage") == "evaluate":
            of = Path(step.get("adapter") or step.get("source", "")).name
            of = of if of in result["steps"] else Path(step.get("source", "")).name
            found.append(Measured(name, of if of in result["steps"] else "source", step))
    return found


def per_block(facts: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """Numbers by block: {"widths": {"": [...]}, "bits": ..., "rank": ..., "error": {"before": [...], "after": [...]}}."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for key, name in PER_BLOCK.items():
        values = [_sum(value) for value in _list(facts.get(key))]
        if values and None not in values:
            found[name] = {"": values}
    blocks = [block for block in _list(facts.get("blocks")) if isinstance(block, Mapping)]
    for key, name in ERRORS.items():
        values = [_mean(block.get(key)) for block in blocks]
        if any(value is not None for value in values):
            found.setdefault("error", {})[name] = values
    ranks = [_mean(block.get("rank")) for block in blocks]
    if any(rank is not None for rank in ranks):
        found["rank"] = {"": ranks}
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sum(value: Any) -> float | None:
    """Return a number unchanged, the sum of a list of numbers, None for anything else."""
    parts = [_mean(each) for each in (value if isinstance(value, list) else [value])]
    return None if None in parts else math.fsum(part for part in parts if part is not None)


def _mean(value: Any) -> float | None:
    """Return a number unchanged, the mean of several by name, None for anything else."""
    if isinstance(value, Mapping):
        numbers = [each for each in value.values() if isinstance(each, (int, float))]
        return statistics.fmean(numbers) if numbers else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def final_model(out: Path, result: Mapping[str, Any]) -> str | None:
    """Name of the step with the final model: the one measured last, else the last that wrote one."""
    written = [name for name in result["steps"] if (out / name / MANIFEST).is_file()]
    looked_at = [each.of for each in measured(result) if each.of in written]
    return looked_at[-1] if looked_at else (written[-1] if written else None)
