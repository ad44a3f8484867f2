"""Average of task vectors, as model soups average weights.

Wortsman et al., arXiv 2203.05482, section 2.

    tau = sum_i w_i tau_i / sum_i w_i                                                                           (1)

symbol  meaning              shape                 name here
tau_i   task vectors         (sources, entries)    values
w_i     weights              (sources,)            weights
"""

from __future__ import annotations

import numpy as np

from compresskit.task_vectors.merging.method import MergeMethod, Values, weighted_sum


class Average(MergeMethod, frozen=True):
    """Equation 1."""

    def merge(self, values: Values, weights: Values) -> Values:
        """(sources, entries), (sources,) -> (entries,)."""
        mean: Values = weighted_sum(values, weights) / weights.sum(dtype=np.float32)
        return mean
