"""random: samples drawn by chance, the floor that a selection has to beat."""

from __future__ import annotations

import random

from compresskit.recover.contract import BudgetMethod, Choice, Pool, Selection


class Random(BudgetMethod):
    """Every sample has the same chance."""

    def select(self, pool: Pool) -> Selection:
        """Draw without replacement."""
        drawn = random.Random(pool.seed).sample(range(len(pool.samples)), self.count(pool))  # noqa: S311
        return Selection([Choice(sample, "drawn by chance") for sample in drawn])
