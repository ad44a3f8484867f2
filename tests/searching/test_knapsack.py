"""searching/knapsack.py: against brute force over all assignments. Oracle."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.searching.knapsack import best_within, filled, front, hull, total

numbers = st.integers(1, 40)
units = st.lists(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4), min_size=1, max_size=4)
"""(cost, size) of each option of each unit."""


def tables(drawn: list[list[tuple[int, int]]]) -> tuple[list[list[float]], list[list[float]]]:
    return [[float(c) for c, _ in unit] for unit in drawn], [[float(b) for _, b in unit] for unit in drawn]


def brute_force(costs: list[list[float]], sizes: list[list[float]], budget: float) -> float | None:
    every = itertools.product(*(range(len(unit)) for unit in costs))
    return min((total(costs, each) for each in every if total(sizes, each) <= budget), default=None)


@settings(deadline=None)
@given(units)
def test_every_point_of_the_front_is_the_best_for_its_bytes(drawn: list[list[tuple[int, int]]]) -> None:
    costs, sizes = tables(drawn)
    points = front(costs, sizes)
    for point in points:
        assert total(costs, point) == brute_force(costs, sizes, total(sizes, point))
    assert [total(sizes, point) for point in points] == sorted(total(sizes, point) for point in points)
    assert total(sizes, points[0]) == sum(map(min, sizes))
    assert total(costs, points[-1]) == sum(map(min, costs))


@settings(deadline=None)
@given(units, st.integers(1, 160))
def test_a_budget_is_held_and_missed_by_less_than_a_step(drawn: list[list[tuple[int, int]]], budget: int) -> None:
    costs, sizes = tables(drawn)
    best, found = brute_force(costs, sizes, budget), best_within(costs, sizes, budget)
    assert (found is None) == (best is None)
    if found is None or best is None:
        return
    assert total(sizes, found) <= budget
    # The optimum lies above the line between the two points of the front around the budget.
    points = front(costs, sizes)
    inside = [point for point in points if total(sizes, point) <= budget]
    beyond = [total(costs, point) for point in points if total(sizes, point) > budget]
    assert best <= total(costs, found) <= total(costs, inside[-1])
    assert not beyond or best >= beyond[0]
    assert filled(costs, sizes, found, budget) == found


def test_the_hull_drops_what_a_mixture_of_others_beats() -> None:
    assert hull([9.0, 5.5, 1.0, 2.0], [1.0, 2.0, 3.0, 4.0]) == [0, 2]
    assert hull([9.0, 4.0, 1.0], [1.0, 2.0, 3.0]) == [0, 1, 2]
