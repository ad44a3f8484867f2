"""TIES-Merging: trim, elect a sign, average the values that agree with it.

Yadav, Tam, Choshen, Raffel, Bansal, arXiv 2306.01708, section 3, algorithm 1.

    trim      keep the k share of largest |tau_i|, over the whole vector                                        (1)
    elect     gamma = sign(sum_i w_i tau_i)                                                                     (2)
    merge     tau = sum_{i in A} w_i tau_i / sum_{i in A} w_i,    A = {i: sign(tau_i) = gamma, tau_i != 0}      (3)

symbol  meaning              shape                 name here
tau_i   task vectors         (sources, entries)    values
w_i     weights              (sources,)            weights
gamma   elected signs        (entries,)            elected
k       share to keep        ()                    density

Differs from the paper: sources have weights. An entry whose sources cancel exactly stays 0; the authors' code takes the
majority sign of the whole vector. Ternary sources are already trimmed and are not trimmed again.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from compresskit.task_vectors.merging.method import MergeMethod, Values, weighted_sum


def elected_signs(values: Values, weights: Values) -> Values:
    """Equation 2: (sources, entries), (sources,) -> (entries,)."""
    return np.sign(weighted_sum(values, weights))


def disjoint_mean(values: Values, weights: Values, elected: Values) -> Values:
    """Equation 3: (entries,); 0 if no source agrees."""
    total, mass = np.zeros_like(elected), np.zeros_like(elected)
    for row, weight in zip(values, weights, strict=True):
        agrees = row * elected > 0
        total += weight * np.where(agrees, row, 0)
        mass += weight * agrees
    return np.divide(total, mass, out=np.zeros_like(total), where=mass > 0)


class Ties(MergeMethod, frozen=True):
    """Equations 1 to 3."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of each dense source's entries to keep."""

    @property
    def trims_to(self) -> float:
        """Equation 1."""
        return self.density

    def merge(self, values: Values, weights: Values) -> Values:
        """(sources, entries), (sources,) -> (entries,)."""
        return disjoint_mean(values, weights, elected_signs(values, weights))
