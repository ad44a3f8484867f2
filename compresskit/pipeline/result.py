"""What every stage that writes something reports of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def stage_result(
    stage: str, settings: dict[str, Any], out: Path, source: Path | list[Path], before: tuple[int, int], after: tuple[int, int]
) -> dict[str, Any]:
    """Describe what a stage read and wrote.

    `settings`: with the name of the method. `source`: one folder, or those that were merged. `before`, `after`: the
    parameters and the bytes of what was read and of what was written.

    Returns:
        The keys that `--json` prints for every such stage; stages add their own.
    """
    return {
        "stage": stage,
        "method": settings["method"],
        "output": str(out),
        "source": [str(each) for each in source] if isinstance(source, list) else str(source),
        "parameters_before": before[0],
        "parameters_after": after[0],
        "bytes_before": before[1],
        "bytes_after": after[1],
        "settings": settings,
    }
