"""report/front.py: a mark for every point that a manifest lists in numbers, and nothing for other steps. Property."""

from __future__ import annotations

from typing import Any

import pytest

from compresskit.report.front import MOST_POINTS, front

FACTS: dict[str, Any] = {
    "chosen": {"bytes": 2_000_000, "kl": 0.5, "kl_quick": 0.4},
    "measured_front": [{"bytes": 1_000_000 * (1 + i), "kl": 1 / (1 + i)} for i in range(5)],
    "random": [{"bytes": 2_000_000, "kl": 1.0 + i / 10} for i in range(64)],
}


def test_every_point_has_a_mark_and_the_chosen_and_the_front_a_row() -> None:
    found = front("search", FACTS)
    assert found.count("<circle") == 1 + 5 + 64
    assert found.count("<tr>") == 1 + 1 + 5
    assert "0.4000" in found


def test_a_step_without_a_search_has_no_chart() -> None:
    assert front("quantize", {"bits": [2, 3]}) == ""


@pytest.mark.parametrize(
    "value", [None, "text", 3, [1], {"bytes": "<b>", "kl": 1}, [{"bytes": float("inf"), "kl": 1}], [{"kl": 1}]]
)
def test_facts_of_another_kind_are_left_out(value: Any) -> None:
    for key in FACTS:
        assert "<b>" not in front("search", FACTS | {key: value})


def test_a_long_list_is_cut() -> None:
    found = front("search", FACTS | {"random": 1000 * FACTS["random"]})
    assert found.count("<circle") == 1 + 5 + MOST_POINTS
