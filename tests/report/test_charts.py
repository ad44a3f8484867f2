"""report/charts.py: names cannot break out of a chart, and ticks cover the values. Property tests."""

from __future__ import annotations

import math
import re
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compresskit.report import charts


def test_a_name_cannot_break_out_of_the_page() -> None:
    drawn = charts.bars("<b>", ["<script>"], [charts.Series("&", [1.0])], ("<i>", '"'))
    assert "<script>" not in drawn
    assert "<b>" not in drawn


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (3, 3), (-2, 5), (1e-9, 3e-9), (0.999, 1.001), (1e6, 7e8)])
def test_ticks_are_few_ascending_and_cover_the_values(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=2, max_size=2))
@example([0.0, math.ulp(0.0)])
@example([-sys.float_info.max, sys.float_info.max])
@example([sys.float_info.max, sys.float_info.max])
def test_any_numbers_can_be_drawn(values: list[float]) -> None:
    found = charts.ticks(min(values), max(values))
    assert 2 <= len(found) <= 10
    assert all(map(math.isfinite, found))
    drawn = charts.bars("t", ["a", "b"], [charts.Series("s", values)], ("x", "y"))
    drawn += charts.line("t", list(enumerate(values)), ("x", "y"))
    drawn += charts.scatter("t", [charts.Point("p", each, each) for each in values], ("x", "y"), ["g"])
    assert not re.search("nan|inf", drawn)
