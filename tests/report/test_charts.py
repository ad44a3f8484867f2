"""report/charts.py: names cannot break out of a chart, and ticks cover the values. Property tests."""

from __future__ import annotations

import pytest

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
