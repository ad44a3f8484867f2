"""What a stage says of itself when it ends: the keys that `--json` prints for every stage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from compresskit.checkpoint.reader import Checkpoint
from compresskit.machine.memory import peak_memory_bytes


def stage_result(
    stage: str,
    settings: dict[str, Any],
    out: Path,
    source: Checkpoint | Path | list[Path],
    before: tuple[int | None, int],
    after: tuple[int | None, int],
) -> dict[str, Any]:
    """Describe what a stage read and wrote.

    `settings`: with the name of the method. `source`: what was read, or the folders that were merged. `before`, `after`: the
    parameters and the bytes of what was read and of what was written; parameters None where they are not counted.

    Returns:
        The keys that `--json` prints for every such stage; stages add their own.
    """
    read = source if isinstance(source, (Path, list)) else source.folder
    return {
        "stage": stage,
        "method": settings["method"],
        "output": str(out),
        "source": [str(each) for each in read] if isinstance(read, list) else str(read),
        "parameters_before": before[0],
        "parameters_after": after[0],
        "bytes_before": before[1],
        "bytes_after": after[1],
        "settings": settings,
    }


def time_and_memory(started: float) -> dict[str, Any]:
    """The keys that close every result; `started`: of time.monotonic()."""
    return {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}
