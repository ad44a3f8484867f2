"""Stages with little text, for tests whose property does not need much."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from compresskit.pruning.method import PruneMethod
from compresskit.pruning.run import prune as prune_stage
from compresskit.stages import Options


def slow_but(*quick: object, of: Iterable[object]) -> list[Any]:
    """Parameters of a test that takes seconds for each of them; all but the quick ones are left to the whole run."""
    return [pytest.param(each, marks=() if each in quick else pytest.mark.slow) for each in of]


def options(text: Path, samples: int = 8) -> Options:
    """Short windows of a text, not many."""
    return Options(calibration=str(text), samples=samples, sequence_length=64)


def prune(source: Path, out: Path, text: Path, method: PruneMethod) -> dict[str, Any]:
    return prune_stage(method, str(source), out, options(text))
