"""report/reference_points.py: others' points stand in the chart, or the file is refused by name. End to end; property."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from fuzz_mutations import VALUES
from fuzz_runs import EVALUATED, result_of

from compresskit.errors import RequestError
from compresskit.report.page import page
from compresskit.report.reference_points import read_points

POINTS = {"AutoRound <b>": [{"bytes": 3e4, "perplexity_ratio": 1.5, "name": "3 bits"}, {"bytes": 2e4, "perplexity_ratio": 3}]}


def write(folder: Path, value: Any) -> Path:
    file = folder / "points.json"
    file.write_text(json.dumps(value))
    return file


def test_others_are_joined_in_the_chart_and_listed_below(run: Run, out: Path, tmp_path: Path) -> None:
    before = (out / "report.html").read_text()
    code, shown, _ = run("report", out, "--reference-points", write(tmp_path, POINTS))
    assert (code, shown) == (0, f"{out / 'report.html'}\n")
    text = (out / "report.html").read_text()
    assert "AutoRound &lt;b&gt; 3 bits" in text
    assert "<b>" not in text
    assert len(re.findall(r'<path class="joining s2" d="M[\d.]+ [\d.]+L[\d.]+ [\d.]+"/>', text)) == 1
    assert "joining s2" not in before
    assert run("report", out)[0] == 0
    assert (out / "report.html").read_text() == before


@pytest.mark.parametrize("value", [each for each in VALUES if not isinstance(each, dict) or each])
def test_values_of_any_kind_are_drawn_or_refused(value: Any, tmp_path: Path) -> None:
    result = result_of(tmp_path, {"e": EVALUATED})
    point = {"bytes": 1, "perplexity_ratio": 1.0, "name": "n"}
    wrong = [value, {"a": value}, {"a": [value]}, *({"a": [point | {key: value}]} for key in point)]
    for each in wrong:
        try:
            file = write(tmp_path, each)
        except (TypeError, ValueError):
            continue
        try:
            found = read_points(file, result)
        except RequestError as error:
            assert str(error).startswith(str(file)), each
        else:
            assert not re.search(r"\b(nan|inf)\b", page(tmp_path, result, found)), each


def test_a_run_without_an_evaluation_has_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="the run has no evaluation"):
        read_points(write(tmp_path, POINTS), result_of(tmp_path, {}))
    with pytest.raises(RequestError, match="at most 12 are drawn"):
        read_points(write(tmp_path, {str(i): POINTS["AutoRound <b>"] for i in range(13)}), result_of(tmp_path, {"e": EVALUATED}))
    absolute = result_of(tmp_path, {"e": EVALUATED | {"perplexity_ratio": None}})
    with pytest.raises(RequestError, match="states no 'perplexity' of point 1 of 'AutoRound <b>', expected a number"):
        read_points(write(tmp_path, POINTS), absolute)
