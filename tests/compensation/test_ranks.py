"""compensation/ranks.py: the budget is dealt by marginal gain. Oracle: every dealing of a small case. Property tests."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from compresskit.compensation.ranks import allocate_ranks

falling = st.lists(st.floats(0, 100), min_size=1, max_size=5).map(lambda values: sorted(values, reverse=True))


@given(st.lists(falling, min_size=1, max_size=4), st.integers(1, 40))
def test_with_equal_costs_no_dealing_gains_more(gains: list[list[float]], budget: int) -> None:
    named = {str(index): values for index, values in enumerate(gains)}
    ranks = allocate_ranks(named, dict.fromkeys(named, 3), budget, 1)
    best = max(
        sum(sum(values[:rank]) for values, rank in zip(gains, choice, strict=True))
        for choice in itertools.product(*(range(len(values) + 1) for values in gains))
        if 3 * sum(choice) <= budget
    )
    found = sum(sum(named[name][:rank]) for name, rank in ranks.items())
    assert abs(found - best) <= 1e-9 * max(1.0, best)


@given(st.lists(falling, min_size=1, max_size=6), st.data(), st.integers(0, 200), st.integers(1, 3))
def test_the_budget_holds_and_ranks_are_multiples_of_the_step(
    gains: list[list[float]], data: st.DataObject, budget: int, step: int
) -> None:
    named = {str(index): values for index, values in enumerate(gains)}
    costs = {name: data.draw(st.integers(1, 30)) for name in named}
    ranks = allocate_ranks(named, costs, budget, step)
    assert sum(costs[name] * rank for name, rank in ranks.items()) <= budget
    assert all(rank % step == 0 and rank <= len(named[name]) for name, rank in ranks.items())


def test_what_gains_nothing_gets_nothing() -> None:
    assert allocate_ranks({"a": [0.0, 0.0], "b": [1.0, 0.0]}, {"a": 1, "b": 1}, 10, 1) == {"a": 0, "b": 1}
