"""searching/switches.py: budgets hold, nothing that fits is left over, switches stay on their levels. Property."""

from __future__ import annotations

import random
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.searching.knapsack import total
from compresskit.searching.switches import Space, descended, ladders, offspring, random_within, switched

rows = st.lists(st.integers(1, 30), min_size=1, max_size=4, unique=True).map(sorted)
tables = st.lists(rows, min_size=1, max_size=6)


@settings(deadline=None)
@given(tables, st.integers(0, 60), st.integers(0, 5))
def test_random_assignments_fill_the_budget(sizes: list[list[int]], more: int, seed: int) -> None:
    budget = sum(row[0] for row in sizes) + more
    found = random_within(sizes, budget, random.Random(seed))
    left = budget - total(sizes, found)
    assert left >= 0
    for row, option in zip(sizes, found, strict=True):
        assert all(other - row[option] > left for other in row if other > row[option])


@settings(deadline=None)
@given(tables, st.integers(0, 60), st.integers(0, 5))
def test_switches_keep_the_budget_and_the_levels(sizes: list[list[int]], more: int, seed: int) -> None:
    costs = [[100.0 / size for size in row] for row in sizes]
    budget, generator = sum(row[0] for row in sizes) + more, random.Random(seed)
    parent = random_within(sizes, budget, generator)
    space = Space(ladders(costs, sizes), sizes, budget)
    child = switched(parent, space, generator)
    assert total(sizes, child) <= budget
    for before, after, levels in zip(parent, child, space.levels, strict=True):
        assert after == before or after in levels
    known = {parent}
    children = offspring(parent, 5, known, space, generator)
    assert len(set(children)) == len(children)
    assert known == {parent, *children}


@settings(deadline=None)
@given(tables, st.integers(0, 60), st.integers(0, 5))
def test_descents_end_at_the_first_step_within_the_budget(sizes: list[list[int]], more: int, seed: int) -> None:
    costs = [[100.0 / size for size in row] for row in sizes]
    budget = sum(row[0] for row in sizes) + more
    largest = tuple(len(row) - 1 for row in sizes)
    space = Space(ladders(costs, sizes), sizes, budget)
    found = descended(largest, costs, space, random.Random(seed))
    assert found is not None
    assert space.size(found) <= budget
    assert all(option <= most for option, most in zip(found, largest, strict=True))
    step = max(max(after - before for before, after in pairwise(row)) if len(row) > 1 else 0 for row in sizes)
    assert space.size(found) > budget - step or found == largest
    assert descended(largest, costs, Space(space.levels, sizes, -1), random.Random(seed)) is None
