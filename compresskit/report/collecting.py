"""Collect a run's result and the manifests of its steps."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compresskit.checkpoint.manifest import NAME as MANIFEST
from compresskit.checkpoint.reader import read_json
from compresskit.errors import RequestError
from compresskit.recipe.run import REPORT

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
    return found


def manifests(out: Path, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Manifest of every step that wrote a model, by name."""
    found = {name: out / name / MANIFEST for name, step in result["steps"].items() if step is not None}
    return {name: read_json(path) for name, path in found.items() if path.is_file()}


def measured(result: Mapping[str, Any]) -> list[Measured]:
    """All evaluations, in order."""
    found = []
    for name, step in result["steps"].items():
        if step is not None and step.get("stage") == "evaluate":
            of = Path(step.get("adapter") or step["source"]).name
            of = of if of in result["steps"] else Path(step["source"]).name
            found.append(Measured(name, of if of in result["steps"] else "source", step))
    return found


def per_block(facts: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """Numbers by block: {"widths": {"": [...]}, "bits": ..., "rank": ..., "error": {"before": [...], "after": [...]}}."""
    found: dict[str, dict[str, list[float | None]]] = {}
    if facts.get("widths"):
        found["widths"] = {"": [float(sum(widths)) for widths in facts["widths"]]}
    if isinstance(facts.get("bits"), list) and facts["bits"]:
        found["bits"] = {"": [float(bits) for bits in facts["bits"]]}
    if isinstance(facts.get("importances"), list) and facts["importances"]:
        found["importance"] = {"": [float(value) for value in facts["importances"]]}
    blocks = [block for block in facts.get("blocks", []) if isinstance(block, Mapping)]
    for key, name in ERRORS.items():
        values = [_mean(block.get(key)) for block in blocks]
        if any(value is not None for value in values):
            found.setdefault("error", {})[name] = values
    ranks = [_mean(block.get("rank")) for block in blocks]
    if any(rank is not None for rank in ranks):
        found["rank"] = {"": ranks}
    return found


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
