"""pruning/method.py: the default step of widths. Against hand-written expectations."""

from __future__ import annotations

import pytest

from compresskit.pruning.method import default_step


@pytest.mark.parametrize(("width", "step"), [(11008, 128), (8192, 128), (4096, 128), (1536, 32), (96, 2), (16, 1)])
def test_the_default_step_leaves_enough_widths(width: int, step: int) -> None:
    assert default_step(width) == step
