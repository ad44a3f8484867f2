"""full: everything, in an order drawn by chance: what a selection saves the time of."""

from __future__ import annotations

import random

from compresskit.recover.contract import Choice, Pool, Selection, SelectionMethod


class Full(SelectionMethod):
    """All samples of the pool."""

    def select(self, pool: Pool) -> Selection:
        """A shuffle."""
        order = list(range(len(pool.samples)))
        random.Random(pool.seed).shuffle(order)  # noqa: S311
        return Selection([Choice(sample, "everything is taken") for sample in order])
