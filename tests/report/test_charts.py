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


@given(st.lists(st.floats(1e-6, 1e9), min_size=2, max_size=6))
def test_a_scale_keeps_the_order_and_holds_every_value(values: list[float]) -> None:
    scale = charts.scale_of(values)
    places = [scale.place(value) for value in sorted(values)]
    assert places == sorted(places, reverse=True)
    assert scale.marks[0] <= min(values) * (1 + 1e-9)
    assert scale.marks[-1] >= max(values) * (1 - 1e-9)
    assert 2 <= len(scale.marks) <= 10
    assert scale.is_logarithmic == (max(values) / min(values) >= 10)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=1, max_size=12))
def test_names_in_a_scatter_plot_cover_neither_each_other_nor_a_mark(places: list[tuple[float, float]]) -> None:
    points = [charts.Point(f"name {i}", x, y) for i, (x, y) in enumerate(places)]
    drawn = charts.scatter("t", points, ("x", "y"), ["g"]).partition('<g class="marks">')[2]
    names = [(float(x), float(y) - 4) for x, y in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)">name', drawn)]
    marks = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', drawn)]
    assert len(marks) == len(points)
    width = 6 * charts.CHARACTER
    for i, (x, y) in enumerate(names):
        assert all(abs(y - b) > 13 or abs(x - a) > width - 1 for a, b in names[i + 1 :])
        assert not any(x < a < x + width and abs(y - b) < 13 for a, b in marks)


def test_the_spread_names_the_lowest_and_the_highest() -> None:
    assert charts.spread(["0", "1", "2"], [3.0, None, 1.5], "block") == "1.5 in block 2 to 3 in block 0"
    assert charts.spread(["0", "1"], [4.0, 4.0], "block") == "4 in every block"


def test_low_bars_beside_a_high_one_are_seen() -> None:
    values = [1.0, 2.0, 3.0, 1000.0]
    drawn = charts.bars("t", list("abcd"), [charts.Series("s", values)], ("block", "error"))
    heights = [float(each) for each in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert heights == sorted(heights)
    room = charts.HEIGHT - charts.TOP - charts.BOTTOM
    assert heights[-1] == pytest.approx(room, abs=0.01)
    assert heights[1] == pytest.approx(room * math.log10(2) / 3, abs=0.01)
