"""Draw assignments: at random for a budget, and by level switches from one that is known.

Level switches are those of EvoPress (arXiv 2410.14649, section 3): one unit goes up a level, another goes down, so that the
bytes stay. Differs from the paper: units have different sizes, so that as many units go down as the budget asks for, and
a level is a step on the unit's own hull of bytes and cost (knapsack.py).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from compresskit.searching.knapsack import Assignment, Table, hull, total


class Space(NamedTuple):
    """Where switches move."""

    levels: Sequence[Sequence[int]]
    """The options of each unit that they use, from the smallest to the largest."""
    sizes: Table
    budget: float

    def size(self, assignment: Sequence[int]) -> float:
        """Bytes of an assignment."""
        return total(self.sizes, assignment)

    def raised(self, unit: int, option: int) -> int | None:
        """The level of a unit next above an option by its bytes; None where there is none."""
        sizes = self.sizes[unit]
        return next((level for level in self.levels[unit] if sizes[level] > sizes[option]), None)

    def lowered(self, unit: int, option: int) -> int | None:
        """The level of a unit next below an option by its bytes; None where there is none."""
        sizes = self.sizes[unit]
        return next((level for level in reversed(self.levels[unit]) if sizes[level] < sizes[option]), None)

    def steps_down(self, assignment: Sequence[int], costs: Table) -> list[tuple[int, int, float, float]]:
        """Every unit's step to its level next below: (unit, level, bytes that it saves, nats that it costs)."""
        found = []
        for unit, option in enumerate(assignment):
            lower = self.lowered(unit, option)
            if lower is not None:
                saved = self.sizes[unit][option] - self.sizes[unit][lower]
                found.append((unit, lower, saved, costs[unit][lower] - costs[unit][option]))
        return found


MOST_SWITCHES = 3
SMALLEST_COST = 1e-12
"""In nats, of a step that costs nothing."""
MOST_DRAWS = 200
"""Draws after which nothing new is found."""


def random_within(sizes: Table, budget: float, generator: random.Random) -> Assignment:
    """Draw options by chance, unit after unit in a random order, until no unit can be larger within the budget.

    Returns:
        The options: of bytes as close below the budget as the units allow, without a look at any cost.
    """
    found = [min(range(len(row)), key=lambda option: (row[option], option)) for row in sizes]
    left = budget - total(sizes, found)
    order = list(range(len(sizes)))
    while True:
        generator.shuffle(order)
        moved = False
        for unit in order:
            row = sizes[unit]
            larger = [option for option in range(len(row)) if 0 < row[option] - row[found[unit]] <= left]
            if larger:
                option = generator.choice(larger)
                left -= row[option] - row[found[unit]]
                found[unit], moved = option, True
        if not moved:
            return tuple(found)


def descended(parent: Assignment, costs: Table, space: Space, generator: random.Random) -> Assignment | None:
    """Steps down from a larger assignment until it is within the budget, drawn by what they save a byte over what they cost.

    Returns:
        The options; None where no unit can be smaller and the budget is still exceeded.
    """
    found = list(parent)
    while space.size(found) > space.budget:
        steps = space.steps_down(found, costs)
        if not steps:
            return None
        weights = [saved / max(cost, SMALLEST_COST) for _, _, saved, cost in steps]
        unit, lower, *_ = generator.choices(steps, weights)[0]
        found[unit] = lower
    return tuple(found)


def ladders(costs: Table, sizes: Table) -> list[list[int]]:
    """The levels of each unit: the options on its hull, from the smallest on."""
    return [hull(*each) for each in zip(costs, sizes, strict=True)]


def switched(assignment: Assignment, space: Space, generator: random.Random) -> Assignment:
    """Some units up a level and others down, within the budget; 1 + the smaller of two draws switches, as in the paper."""
    found = list(assignment)
    for _ in range(1 + min(generator.randrange(MOST_SWITCHES), generator.randrange(MOST_SWITCHES))):
        above = [(unit, level) for unit, option in enumerate(found) if (level := space.raised(unit, option)) is not None]
        if not above:
            break
        risen, found[risen] = generator.choice(above)
        others = [unit for unit in range(len(found)) if unit != risen]
        generator.shuffle(others)
        for unit in others:
            if space.size(found) <= space.budget:
                break
            lower = space.lowered(unit, found[unit])
            found[unit] = found[unit] if lower is None else lower
    return tuple(found) if space.size(found) <= space.budget else assignment


def offspring(parent: Assignment, count: int, known: set[Assignment], space: Space, generator: random.Random) -> list[Assignment]:
    """Up to `count` assignments by switches from a parent, none of which is `known`; they are known afterwards."""
    found: list[Assignment] = []
    for _ in range(MOST_DRAWS):
        if len(found) == count:
            break
        child = switched(parent, space, generator)
        if child not in known:
            known.add(child)
            found.append(child)
    return found
