"""One way of calling compensation, for its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresskit.compensation.method import CompensateMethod
from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate


def run(method: CompensateMethod, source: Path, out: Path, original: Path, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return compensate(method, str(source), out, CompensateOptions(original=str(original), **{**text, **more}))
