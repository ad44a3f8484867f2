"""random and full: samples drawn by chance, the floor that a selection has to beat, and all samples, whose time it saves."""

from __future__ import annotations

import random

from compresskit.recovery.method import BudgetMethod, Choice, Pool, Selection, SelectionMethod


class Random(BudgetMethod):
    """Every sample has the same chance."""

    def select(self, pool: Pool) -> Selection:
        """Draw without replacement."""
        drawn = random.Random(pool.seed).sample(range(len(pool.samples)), self.count(pool))  # noqa: S311
        return Selection([Choice(sample, "drawn by chance") for sample in drawn])


class Full(SelectionMethod):
    """All samples of the pool, in an order drawn by chance."""

    def select(self, pool: Pool) -> Selection:
        """A shuffle."""
        order = list(range(len(pool.samples)))
        random.Random(pool.seed).shuffle(order)  # noqa: S311
        return Selection([Choice(sample, "everything is taken") for sample in order])
