"""Task arithmetic: the sum of task vectors, times a factor.

Ilharco et al., arXiv 2212.04089, section 2.

    tau = lambda sum_i w_i tau_i                                                                                (1)

lambda is `scaling`; tau_i (sources, entries) `values`; w_i (sources,) `weights`. The paper finds lambda between 0.3 and 0.5
for several tasks; the default here, 0.4, is the one that TIES-Merging (arXiv 2306.01708, section 4) compares with.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from compresskit.task_vectors.merging.method import MergeMethod, Values, weighted_sum


class TaskArithmetic(MergeMethod, frozen=True):
    """Equation 1."""

    scaling: Annotated[float, Field(gt=0)] = 0.4
    """Factor of the merged vector."""

    def merge(self, values: Values, weights: Values) -> Values:
        """(sources, entries), (sources,) -> (entries,)."""
        return weighted_sum(values, weights)
