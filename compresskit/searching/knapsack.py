"""Choose one option for every unit: the Pareto front of bytes and cost, and the best point within a budget.

    minimise sum_u c(u, a_u)    subject to    sum_u b(u, a_u) <= B                                       (1)

symbol  meaning                                      name here
a_u     the option of unit u                         assignment[u]
c, b    its cost in nats and its size in bytes       costs[u][a], sizes[u][a]

The multiple-choice knapsack (Sinha and Zoltners, The Multiple-Choice Knapsack Problem, 1979). For a price lambda of a byte
each unit alone takes argmin_a c + lambda b. All prices together give the lower convex hull of equation 1: each unit walks up
its own hull of options, and the steps of all units come in the order of what they save per byte. Every point of that hull is
the best there is for its own bytes. A budget between two points is filled by the steps that still fit, best first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

Assignment = tuple[int, ...]
"""The number of the option of each unit."""
Table = Sequence[Sequence[float]]
"""A number for each option of each unit."""


def total(table: Table, assignment: Sequence[int]) -> float:
    """Sum over the units of what the table says of their options."""
    return sum(row[option] for row, option in zip(table, assignment, strict=True))


def hull(costs: Sequence[float], sizes: Sequence[float]) -> list[int]:
    """Options of one unit on its lower convex hull, from the smallest to the cheapest in cost."""
    found: list[int] = []
    for option in sorted(range(len(costs)), key=lambda option: (sizes[option], costs[option], option)):
        if found and costs[option] >= costs[found[-1]]:
            continue
        while len(found) > 1 and _saving(costs, sizes, found[-2], found[-1]) <= _saving(costs, sizes, found[-2], option):
            found.pop()
        found.append(option)
    return found


def _saving(costs: Sequence[float], sizes: Sequence[float], lower: int, higher: int) -> float:
    """What the step from one option to a larger one saves, in nats a byte."""
    return (costs[lower] - costs[higher]) / max(sizes[higher] - sizes[lower], 1e-9)


def front(costs: Table, sizes: Table) -> list[Assignment]:
    """The Pareto front of equation 1 as far as it is convex, from the smallest model to the largest."""
    hulls = [hull(*each) for each in zip(costs, sizes, strict=True)]
    steps = sorted(
        (-_saving(costs[unit], sizes[unit], lower, higher), unit, place)
        for unit, options in enumerate(hulls)
        for place, (lower, higher) in enumerate(pairwise(options))
    )
    points = [tuple(options[0] for options in hulls)]
    for _, unit, place in steps:
        before = points[-1]
        points.append((*before[:unit], hulls[unit][place + 1], *before[unit + 1 :]))
    return points


def best_within(costs: Table, sizes: Table, budget: float) -> Assignment | None:
    """The last point of the front within the budget, filled up with the steps that save most per byte and still fit.

    Returns:
        The options of the units; None where the smallest model exceeds the budget.
    """
    points = [point for point in front(costs, sizes) if total(sizes, point) <= budget]
    return filled(costs, sizes, points[-1], budget) if points else None


def filled(costs: Table, sizes: Table, assignment: Assignment, budget: float) -> Assignment:
    """Spend what is left of a budget: one step after the other, the one that saves most per byte first."""
    found, left = list(assignment), budget - total(sizes, assignment)
    while True:
        steps = [
            (_saving(costs[unit], sizes[unit], option, other), -unit, other)
            for unit, option in enumerate(found)
            for other in range(len(costs[unit]))
            if costs[unit][other] < costs[unit][option] and sizes[unit][other] - sizes[unit][option] <= left
        ]
        if not steps:
            return tuple(found)
        _, unit, other = max(steps)
        left -= sizes[-unit][other] - sizes[-unit][found[-unit]]
        found[-unit] = other
