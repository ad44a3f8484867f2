"""What merging methods share: weights, a factor, and one verb over the sources' values at the same places."""

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

    Sums run over the sources one after the other, so that an entry's result depends on its values alone, not on where it
    lies: that is what makes the ternary path (a table of all patterns of signs) equal the one on floats exactly.
    """

    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weight of a source, in their order; repeated, once a source. Left out, all weigh 1."""
    scaling: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the merged vector."""

    whole: ClassVar[bool] = False
    """Whether `merge` must see all entries at once."""

    def source_weights(self, count: int) -> Values:
        """One weight a source, (sources,); 1 where the settings name none."""
        return np.array(self.weights or [1.0] * count, np.float32)

    def merge(self, values: Values, weights: Values) -> Values:
        """One vector of several, without `scaling`: values (sources, entries), weights (sources,) -> (entries,)."""
        raise TypeError(f"{type(self).__name__} defines no merge")

    @property
    def trims_to(self) -> float:
        """Share of each dense source's entries that are kept before merging."""
        return 1.0
