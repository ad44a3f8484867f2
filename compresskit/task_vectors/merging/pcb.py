"""PCB-Merging: parameters compete within their task and between tasks; losers are dropped, winners are rescaled.

Du et al., arXiv 2410.02396, section 3, and the authors' code where the two differ.

    intra_i = exp(m N(|tau_i|)**2)                        N: to [0, 1] by the smallest and the largest of the vector  (1)
    inter_i = tanh(tau_i sum_j tau_j)                                                                               (2)
    beta_i  = intra_i inter_i;  the r share of largest beta_i is kept                                               (3)
    s_i     = N(beta_i, not below the smallest kept)                                                                 (4)
    tau     = sum_i w_i s_i tau_i / sum_i w_i s_i                                                                    (5)

symbol  meaning                 shape                 name here
tau_i   task vectors            (sources, entries)    values
m       number of sources       ()                    len(values)
r       share to keep           ()                    ratio
w_i     weights                 (sources,)            weights

Differs from the code: magnitudes are not clipped at their outermost 0.01%, which has no effect on ternary vectors. The
vectors are held in memory: 4 bytes x entries x sources, and three times that during the merge.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from compresskit.task_vectors.merging.method import MergeMethod, Values, weighted_sum


def normalized(row: Values) -> Values:
    """N: (entries,) to [0, 1]; zeros if all entries are equal."""
    low, high = row.min(), row.max()
    found: Values = (row - low) / (high - low) if high > low else np.zeros_like(row)
    return found


def balance(row: Values, total: Values, sources: int) -> Values:
    """Equations 1 to 3 of one source, before the cut: (entries,). `total` is the sum of all sources."""
    beta: Values = np.exp(sources * normalized(np.abs(row)) ** 2) * np.tanh(row * total)
    return beta


def share(beta: Values, ratio: float) -> Values:
    """Equation 4: (entries,)."""
    place = min(len(beta) - 1, int(len(beta) * (1 - ratio)))
    return normalized(np.maximum(beta, np.partition(beta, place)[place]))


class PCB(MergeMethod, frozen=True):
    """Equations 1 to 5."""

    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of each source's entries that win the competition."""

    whole: ClassVar[bool] = True

    def merge(self, values: Values, weights: Values) -> Values:
        """(sources, entries), (sources,) -> (entries,)."""
        total = weighted_sum(values, np.ones_like(weights))
        merged, mass = np.zeros_like(total), np.zeros_like(total)
        for row, weight in zip(values, weights, strict=True):
            part = weight * share(balance(row, total, len(values)), self.ratio)
            merged += part * row
            mass += part
        return np.divide(merged, mass, out=np.zeros_like(merged), where=mass > 0)
