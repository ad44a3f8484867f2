"""Stages with little text, for tests whose property does not need much."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from compresskit.checkpoint.writer import Writer
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


class Stopped(Exception):
    """Ends a run."""


def stopped_after_two_blocks(run: Callable[[], object]) -> None:
    """Run until two blocks are on disk, as if the process had ended there."""
    finish = Writer.finish_block

    def stop(writer: Writer, index: int, facts: dict[str, Any]) -> None:
        finish(writer, index, facts)
        if len(writer.done) == 2:
            raise Stopped

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Writer, "finish_block", stop)
        run()
