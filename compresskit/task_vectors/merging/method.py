"""Interface of merging methods: weights, a factor, and a merge of the sources' values at the same entries."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from compresskit.stages import Method

Values = NDArray[np.float32]


def weighted_sum(values: Values, weights: Values) -> Values:
    """Sum over the sources, one after the other: (sources, entries), (sources,) -> (entries,)."""
    total = np.zeros(values.shape[1], np.float32)
    for row, weight in zip(values, weights, strict=True):
        total += weight * row
    return total


class MergeMethod(Method, frozen=True):
    """Merge task vectors entry by entry.

    Sums run over the sources one after the other, so that an entry's result depends only on its values, not on its position.
    This makes the ternary path (a table of all sign patterns) exactly equal to the float path.
    """

    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weight of each source, in order; repeat once per source. Default: all 1."""
    scaling: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the merged vector."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which entries of the sources are dropped, the others scaled by 1 / (1 - drop) (arXiv 2311.03099)."""
    drop_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of --drop."""

    whole: ClassVar[bool] = False
    """Whether `merge` needs all entries at once."""

    def source_weights(self, count: int) -> Values:
        """One weight per source, (sources,); 1 if the settings name none."""
        return np.array(self.weights or [1.0] * count, np.float32)

    def merge(self, values: Values, weights: Values) -> Values:
        """Merge several vectors, without `scaling`: values (sources, entries), weights (sources,) -> (entries,)."""
        raise TypeError(f"{type(self).__name__} defines no merge")

    @property
    def trims_to(self) -> float:
        """Share of each dense source's entries to keep before merging."""
        return 1.0
