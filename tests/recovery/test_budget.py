"""recovery/budget.py: a budget is dealt exactly, in proportion, never above a cluster's size. Property tests."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.errors import RequestError
from compresskit.recovery.budget import members_of, split_budget


@given(st.data())
def test_a_budget_is_dealt_exactly_and_never_above_a_clusters_size(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 60), min_size=1, max_size=12))
    weight = st.floats(0, 1, allow_subnormal=False)
    weights = data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)))
    budget = data.draw(st.integers(0, sum(sizes)))
    counts = split_budget(weights, sizes, budget)
    assert sum(counts) == budget
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=12), st.integers(0, 500))
def test_without_caps_every_cluster_gets_its_quota_rounded_down_or_up(weights: list[float], budget: int) -> None:
    counts = split_budget(weights, [10_000] * len(weights), budget)
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - budget * weight / math.fsum(weights)) < 1 + 1e-9


def test_what_a_full_cluster_cannot_take_flows_on_in_proportion() -> None:
    assert split_budget([0.8, 0.1, 0.1], [2, 50, 50], 12) == [2, 5, 5]
    assert split_budget([1.0, 0.0], [3, 9], 5) == [3, 2]
    with pytest.raises(RequestError, match="12 are there"):
        split_budget([1.0], [12], 13)


def test_members_are_the_positions_of_each_label() -> None:
    assert members_of([1, 0, 1, 3]) == [[1], [0, 2], [], [3]]
