"""searching/corrections.py: factors that trials show are found, and without any trial nothing changes. Oracle."""

from __future__ import annotations

import random

import pytest
from scipy.optimize import lsq_linear

from compresskit.searching import corrections
from compresskit.searching.corrections import LEAST_SHARE, RIDGE, corrected
from compresskit.searching.knapsack import total

COSTS = [[0.9 / (1 + unit), 0.3 / (2 + unit), 0.1 / (1 + unit)] for unit in range(10)]
KINDS = [[(unit % 2, bits) for bits in (2, 3, 4)] for unit in range(10)]
TRUE = {(0, 2): 3.0, (1, 2): 1.5, (0, 3): 1.0, (1, 3): 0.8, (0, 4): 0.6, (1, 4): 0.5}


def trials(count: int) -> dict[tuple[int, ...], float]:
    draw = random.Random(0)
    true = [[cost * TRUE[kind] for cost, kind in zip(row, kinds, strict=True)] for row, kinds in zip(COSTS, KINDS, strict=True)]
    drawn = [tuple(draw.randrange(3) for _ in COSTS) for _ in range(count)]
    return {each: total(true, each) for each in drawn}


def test_trials_show_the_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corrections, "RIDGE", 1e-9)
    found = corrected(COSTS, KINDS, trials(40))
    for row, costs, kinds in zip(found, COSTS, KINDS, strict=True):
        for new, old, kind in zip(row, costs, kinds, strict=True):
            assert new / old == pytest.approx(TRUE[kind], rel=1e-5)


def test_few_trials_give_the_bounded_least_squares() -> None:
    known = trials(8)
    found = corrected(COSTS, KINDS, known)
    names = sorted(TRUE, key=str)
    rows = [
        [sum(COSTS[u][o] for u, o in enumerate(each) if KINDS[u][o] == name) / loss for name in names]
        for each, loss in known.items()
    ]
    sums = [sum(row) for row in rows]
    common = sum(sums) / sum(value * value for value in sums)
    root = RIDGE**0.5
    matrix = [[value * common for value in row] for row in rows]
    matrix += [[root if i == j else 0.0 for j in range(len(names))] for i in range(len(names))]
    expected = lsq_linear(matrix, [1.0] * len(rows) + [root] * len(names)).x
    assert min(expected) > LEAST_SHARE
    assert [found[u][o] / COSTS[u][o] / common for u, o in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))] == pytest.approx(
        [expected[names.index(KINDS[u][o])] for u, o in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))]
    )


def test_without_a_loss_the_scores_stay() -> None:
    assert corrected(COSTS, KINDS, {}) == COSTS
    assert corrected(COSTS, KINDS, {(0,) * 10: 0.0}) == COSTS
