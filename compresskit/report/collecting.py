"""Collect a run's result and the manifests of its steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compresskit.checkpoint.kinds import OBJECT, TEXT, Kind, Stated, is_number
from compresskit.checkpoint.manifest import chain
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.small_files import inside, read_json
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import RequestError
from compresskit.recipe.results import check_run
from compresskit.recipe.run import REPORT

PER_BLOCK = {"widths": "widths", "bits": "bits", "importances": "importance"}
"""Facts that list a number for each block, or several to add up, and what they are called here."""
ERRORS = {
    "relative_output_error": "output error",
    "relative_output_errors": "output error",
    "start_error": "before training",
    "kept_error": "after training",
    "error": "output error",
    "error_before": "before the repair",
    "error_after": "after the repair",
}
"""Error facts of a block, and their labels."""
LINK: dict[str, Kind] = {"stage": TEXT.always, "method": TEXT.always, "facts": OBJECT}
"""What is shown of a manifest, and of those before it."""
LARGEST = 1e300
"""Of a number in a chart, so that sums of them stay finite."""


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
    check_run(found, Stated(out / REPORT, remedy="run the recipe again"))
    for name in found["steps"]:
        inside(out, name, out / REPORT)
    return found


def manifests(out: Path, result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Manifest of every step that wrote a model, by name; raises CheckpointError for one that cannot be shown."""
    found = {name: read_manifest(out / name) for name, step in result["steps"].items() if step is not None}
    made = {name: manifest for name, manifest in found.items() if manifest is not None}
    for name, manifest in made.items():
        for link in chain(manifest):
            Stated(out / name / MANIFEST).check(link, LINK)
    return made


def measured(result: Mapping[str, Any]) -> list[Measured]:
    """All evaluations, in order."""
    found = []
    for name, step in result["steps"].items():
        if step is not None and step.get("stage") == "evaluate":
            source = step.get("source") or ""
            of = Path(step.get("adapter") or source).name
            of = of if of in result["steps"] else Path(source).name
            found.append(Measured(name, of if of in result["steps"] else "source", step))
    return found


def quality_key(result: Mapping[str, Any]) -> str | None:
    """The figure in which all evaluations of a run can be compared; None where there is none."""
    reports = [each.report for each in measured(result)]
    if not reports:
        return None
    return "perplexity_ratio" if all(report.get("perplexity_ratio") for report in reports) else "perplexity"


def per_block(facts: Mapping[str, Any]) -> dict[str, dict[str, list[float | None]]]:
    """Numbers by block: {"widths": {"": [...]}, "bits": ..., "rank": ..., "error": {"before": [...], "after": [...]}}."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for key, name in PER_BLOCK.items():
        values = [_sum(value) for value in listed(facts.get(key))]
        if values and None not in values:
            found[name] = {"": values}
    blocks = [block for block in listed(facts.get("blocks")) if isinstance(block, Mapping)]
    for key, name in ERRORS.items():
        values = [_mean(block.get(key)) for block in blocks]
        if any(value is not None for value in values):
            found.setdefault("error", {})[name] = values
    ranks = [_mean(block.get("rank")) for block in blocks]
    if any(rank is not None for rank in ranks):
        found["rank"] = {"": ranks}
    return found


def listed(value: Any) -> list[Any]:
    """Return a list unchanged, an empty one for anything else."""
    return value if isinstance(value, list) else []


def _sum(value: Any) -> float | None:
    """Return a number unchanged, the sum of a list of numbers, None for anything else."""
    parts = [_mean(each) for each in (value if isinstance(value, list) else [value])]
    return None if None in parts else math.fsum(part for part in parts if part is not None)


def _mean(value: Any) -> float | None:
    """Return a number unchanged, the mean of several by name, None for anything else."""
    if isinstance(value, Mapping):
        numbers = [each for each in map(number, value.values()) if each is not None]
        return statistics.fmean(numbers) if numbers else None
    return number(value)


def number(value: Any) -> float | None:
    """Return a number that a chart can show, None for anything else."""
    return float(value) if is_number(value) and abs(value) <= LARGEST else None


def final_model(out: Path, result: Mapping[str, Any]) -> str | None:
    """Name of the step with the final model: the one measured last, else the last that wrote one."""
    written = [name for name, step in result["steps"].items() if step is not None and (out / name / MANIFEST).is_file()]
    looked_at = [each.of for each in measured(result) if each.of in written]
    return looked_at[-1] if looked_at else (written[-1] if written else None)
