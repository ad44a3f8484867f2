"""random and full: randomly drawn samples, the baseline of any selection, and all samples, at the full training time."""

from __future__ import annotations

import random
from typing import ClassVar

from compresskit.recovery.method import BudgetMethod, Choice, Pool, Selection, SelectionMethod


class Random(BudgetMethod):
    """Every sample has the same probability."""

    chooses: ClassVar[bool] = False

    def select(self, pool: Pool) -> Selection:
        """Draw samples without replacement."""
        drawn = random.Random(pool.seed).sample(range(len(pool.samples)), self.count(pool))  # noqa: S311
        return Selection([Choice(sample, "drawn by chance") for sample in drawn])


class Full(SelectionMethod):
    """All samples of the pool, in random order."""

    chooses: ClassVar[bool] = False

    def select(self, pool: Pool) -> Selection:
        """Shuffle the pool."""
        order = list(range(len(pool.samples)))
        random.Random(pool.seed).shuffle(order)  # noqa: S311
        return Selection([Choice(sample, "everything is taken") for sample in order])
