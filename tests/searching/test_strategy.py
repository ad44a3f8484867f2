"""searching/strategy.py and searching/records.py: the best measured is chosen, a stopped search ends the same. Property."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from compresskit.searching.knapsack import Assignment, total
from compresskit.searching.records import FILE, Records
from compresskit.searching.results import rank_correlation
from compresskit.searching.strategy import Found, Problem, within_budget, within_loss

UNITS, WINDOWS, STOPPED = 12, 4, 3
SIZES = [[10.0 + unit % 3, 15.0 + unit % 3, 20.0 + unit % 3] for unit in range(UNITS)]
COSTS = [[0.4 / (1 + unit), 0.2 / (1 + unit), 0.1 / (1 + unit)] for unit in range(UNITS)]
KINDS = [[(str(unit % 5), bits) for bits in (2, 3, 4)] for unit in range(UNITS)]
TRUE = [[0.4 / (1 + unit % 5), 0.15 / (1 + unit), 0.12 / (1 + unit)] for unit in range(UNITS)]
"""What trials measure: the scores are wrong about it."""


class Stop(Exception):
    """An interrupt."""


def measured(assignments: Sequence[Assignment], first: int, last: int) -> list[list[float]]:
    return [[total(TRUE, each) * (1 + window / 10) for window in range(first, last)] for each in assignments]


def problem(most: int = 2000) -> Problem:
    return Problem(COSTS, SIZES, KINDS, 2, WINDOWS, most, seed=0)


def run(folder: Path, calls: int = 10**9) -> tuple[Found, Records]:
    """A search that is stopped after some calls."""
    left = [calls]

    def stopping(assignments: Sequence[Assignment], first: int, last: int) -> list[list[float]]:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return measured(assignments, first, last)

    records = Records.read(folder, stopping, 16)
    return within_budget(problem(), records, 180.0), records


def test_the_choice_beats_the_prediction_and_every_random_assignment(tmp_path: Path) -> None:
    found, records = run(tmp_path)
    true = {each: total(TRUE, each) for each in (found.start, found.chosen)}
    assert total(SIZES, found.chosen) <= 180
    assert true[found.chosen] < true[found.start]
    assert len(found.random) == 64
    assert true[found.chosen] < min(total(TRUE, each) for each, _ in found.random)
    assert all(total(SIZES, each) <= 180 for each in records.asked if each not in found.front)
    assert records.windows <= 2000


def test_a_stopped_search_goes_on_to_the_same_end_and_measures_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole, one = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "stopped", calls=STOPPED)
    file = tmp_path / "stopped" / FILE
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines) + lines[-1][:10])  # killed while it wrote
    again, other = run(tmp_path / "stopped")
    assert again == whole
    assert other.windows == one.windows
    assert (tmp_path / "stopped" / FILE).read_text() == (tmp_path / "whole" / FILE).read_text()


@pytest.mark.parametrize("most", [0.5, 1.0, 1.7])
def test_a_largest_loss_is_kept_with_few_bytes(most: float, tmp_path: Path) -> None:
    found = within_loss(problem(), Records.read(tmp_path, measured, 16), most)
    assert found is not None
    factor = sum(1 + window / 10 for window in range(WINDOWS)) / WINDOWS
    assert total(TRUE, found.chosen) * factor <= most
    smaller = [each for each in found.front if total(SIZES, each) < total(SIZES, found.chosen)]
    assert all(total(TRUE, each) * factor > most for each in smaller)


def test_a_loss_that_nothing_meets_finds_nothing(tmp_path: Path) -> None:
    assert within_loss(problem(), Records.read(tmp_path, measured, 16), 1e-6) is None


def test_the_rank_correlation_is_scipys() -> None:
    first, second = [3.0, 1.0, 2.0, 2.0, 5.0], [9.0, 1.0, 1.0, 4.0, 5.0]
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0
