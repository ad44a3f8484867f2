"""The search itself: the front, random assignments, and level switches, all judged by the measured divergence.

    front        FRONT_POINTS points of the predicted front, on a few windows: how well the prediction orders them
    random       RANDOM assignments of the budget's bytes, on the same windows: what a search must beat
    corrected    the scores times factors that all trials so far show (corrections.py), and the best choice by them, REFITS times
    descents     random steps down to the budget from the smallest measured points of the front above it: the loss may fall off
                 a cliff between them and the best by the scores, which no sum of scores shows
    switches     generations of TOGETHER children of the best assignment so far, on a few windows; the best quarter of them
                 on all windows; the best of these takes the parent's place if it is better there (EvoPress, arXiv 2410.14649)

With a largest loss instead of a budget, the smallest point of the corrected front that meets it is found by halving, switches
lower its loss, and steps down the hulls spend that gain.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from compresskit.searching.corrections import Kinds, corrected
from compresskit.searching.knapsack import Assignment, Table, best_within, front, total
from compresskit.searching.records import Records
from compresskit.searching.request import FRONT_POINTS, RANDOM, TOGETHER
from compresskit.searching.switches import Space, descended, ladders, offspring, random_within

REFITS = 3
PARENTS = 2
"""Points of the front from which descents start."""
SURVIVORS = 4
"""Children of a generation that are measured on all windows."""


@dataclass(frozen=True)
class Problem:
    """What is searched, and what may be spent."""

    costs: Table
    sizes: Table
    kinds: Kinds
    quick_windows: int
    """Windows on which a trial is measured first."""
    windows: int
    """Windows on which the last judgement is made."""
    most_windows: int
    """Windows after which no more generations of switches, or steps down, begin."""
    seed: int


@dataclass
class Found:
    """What a search found."""

    start: Assignment
    """The best by the scores alone."""
    chosen: Assignment
    budget: float
    front: list[Assignment]
    """Every point of the front by the scores alone."""
    costs: Table
    """The corrected scores."""
    measured: dict[Assignment, float] = field(default_factory=dict)
    """KL of points of the front on a few windows."""
    random: list[tuple[Assignment, float]] = field(default_factory=list)
    """Random assignments of equal bytes, with their KL on a few windows."""
    generations: list[dict[str, float]] = field(default_factory=list)
    """KL of the parent after each generation, and the windows taken by then."""


def within_budget(problem: Problem, records: Records, budget: float) -> Found:
    """Search the assignment of least measured divergence within a budget of bytes; the smallest one fits."""
    start = best_within(problem.costs, problem.sizes, budget)
    assert start is not None, "the request checks that the smallest assignment fits"
    found = Found(start, start, budget, front(problem.costs, problem.sizes), problem.costs)
    _measure_front(problem, records, found)
    _measure_random(problem, records, found)
    rivals = [start]
    for _ in range(REFITS):
        found.costs = _refitted(problem, records)
        best = best_within(found.costs, problem.sizes, budget)
        assert best is not None
        rivals.append(best)
        records.kl([best], problem.quick_windows)
    rivals += _descents(problem, records, found)
    _switch(problem, records, found, rivals)
    return found


def within_loss(problem: Problem, records: Records, most: float) -> Found | None:
    """Search the fewest bytes whose measured divergence is at most `most` nats a token; None where no assignment's is."""
    points = front(problem.costs, problem.sizes)
    if records.kl([points[-1]], problem.windows)[0] > most:
        return None
    found = Found(points[-1], points[-1], total(problem.sizes, points[-1]), points, problem.costs)
    found.start = _smallest(problem, records, points, most)
    _measure_front(problem, records, found)
    found.costs = _refitted(problem, records)
    refitted = [*front(found.costs, problem.sizes), points[-1]]
    rivals = sorted((found.start, _smallest(problem, records, refitted, most)), key=lambda each: total(problem.sizes, each))
    found.budget = total(problem.sizes, rivals[0])
    _measure_random(problem, records, found)
    _switch(problem, records, found, rivals[:1])
    while (smaller := _lowered(problem, records, found, most)) is not None:
        found.chosen = smaller
        found.budget = total(problem.sizes, smaller)
        if records.windows >= problem.most_windows:
            break
    return found


def _smallest(problem: Problem, records: Records, points: Sequence[Assignment], most: float) -> Assignment:
    """The first point of a front that keeps to the loss, found by halving; the last one does."""
    low, high = 0, len(points) - 1
    while low < high:
        middle = (low + high) // 2
        if records.kl([points[middle]], problem.windows)[0] <= most:
            high = middle
        else:
            low = middle + 1
    return points[high]


def _refitted(problem: Problem, records: Records) -> list[list[float]]:
    """The scores with the factors that all trials so far show."""
    asked = sorted(records.asked)  # not `known`: an interrupted search may have left more
    losses = records.kl(asked, problem.quick_windows)
    return corrected(problem.costs, problem.kinds, dict(zip(asked, losses, strict=True)))


def _measure_front(problem: Problem, records: Records, found: Found) -> None:
    """Measure points of the front, as many of its points apart from each other."""
    last = len(found.front) - 1
    places = dict.fromkeys(round(number * last / (FRONT_POINTS - 1)) for number in range(FRONT_POINTS))
    chosen = [found.front[place] for place in places]
    found.measured = dict(zip(chosen, records.kl(chosen, problem.quick_windows), strict=True))


def _measure_random(problem: Problem, records: Records, found: Found) -> None:
    """Measure random assignments of the budget's bytes."""
    generator = random.Random(problem.seed)  # noqa: S311
    drawn = [random_within(problem.sizes, found.budget, generator) for _ in range(RANDOM)]
    found.random = list(zip(drawn, records.kl(drawn, problem.quick_windows), strict=True))


def _descents(problem: Problem, records: Records, found: Found) -> list[Assignment]:
    """The best by a few windows of some descents to the budget."""
    space = _space(problem, problem.costs, found.budget)
    above = sorted((each for each in found.measured if total(problem.sizes, each) > found.budget), key=space.size)
    parents, generator = above[:PARENTS], random.Random(problem.seed + 2)  # noqa: S311
    drawn = [descended(parent, problem.costs, space, generator) for parent in parents for _ in range(TOGETHER // PARENTS)]
    children = list(dict.fromkeys(child for child in drawn if child is not None))
    losses = records.kl(children, problem.quick_windows)
    return [min(zip(losses, children, strict=True))[1]] if children else []


def _space(problem: Problem, costs: Table, budget: float) -> Space:
    return Space(ladders(costs, problem.sizes), problem.sizes, budget)


def _switch(problem: Problem, records: Records, found: Found, rivals: Sequence[Assignment]) -> None:
    """Improve the chosen assignment while windows are left, starting from the best of some rivals and the random best."""
    rivals = list(dict.fromkeys([*rivals, min(found.random, key=lambda pair: pair[1])[0]]))
    quick = records.kl(rivals, problem.quick_windows)
    rivals = [rival for _, rival in sorted(zip(quick, rivals, strict=True))[:SURVIVORS]]
    losses = records.kl(rivals, problem.windows)
    parent, least = min(zip(rivals, losses, strict=True), key=lambda pair: pair[1])
    space = _space(problem, found.costs, found.budget)
    generator, seen = random.Random(problem.seed + 1), set(records.asked)  # noqa: S311
    a_generation = TOGETHER * problem.quick_windows + SURVIVORS * (problem.windows - problem.quick_windows)
    found.generations.append({"kl": least, "windows": records.windows})
    while records.windows + a_generation <= problem.most_windows:
        children = offspring(parent, TOGETHER, seen, space, generator)
        if not children:
            break
        quick = records.kl(children, problem.quick_windows)
        survivors = [child for _, child in sorted(zip(quick, children, strict=True))][:SURVIVORS]
        best, child = min(zip(records.kl(survivors, problem.windows), survivors, strict=True))
        if best < least:
            parent, least = child, best
        found.generations.append({"kl": least, "windows": records.windows})
    found.chosen = parent


def _lowered(problem: Problem, records: Records, found: Found, most: float) -> Assignment | None:
    """The smallest of a few assignments below this one, by the steps that cost least a byte, that keeps to the loss."""
    space = _space(problem, found.costs, found.budget)
    steps, options = [], list(found.chosen)
    for _ in range(TOGETHER):
        down = space.steps_down(options, found.costs)
        if not down:
            break
        unit, lower, *_ = min(down, key=lambda step: step[3] / step[2])
        options[unit] = lower
        steps.append(tuple(options))
    kept = [step for step, loss in zip(steps, records.kl(steps, problem.windows), strict=True) if loss <= most]
    return kept[-1] if kept else None
