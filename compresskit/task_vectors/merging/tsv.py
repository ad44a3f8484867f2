"""TSV-M: task singular vectors, made orthogonal across tasks before they are summed.

Gargiulo, Crisostomi, Bucarelli, Scardapane, Silvestri, Rodola, arXiv 2412.00081, section 4.2.

    D_i = U_i S_i V_i^T,  the k_i largest singular values                                                       (1)
    U = [U_1 .. U_n],  V = [V_1 .. V_n],  S = diag(w_1 S_1 .. w_n S_n)                                          (2)
    U' = U (U^T U)^-1/2,  V' = V (V^T V)^-1/2                          the nearest orthonormal columns          (3)
    D = lambda U' S V'^T                                                                                        (4)

symbol  meaning                                                 shape               name here
D_i     update of a weight by source i                          (out, in)           second @ first
k_i     ranks kept of it                                        ()                  kept
U, V    singular vectors of all sources, side by side           (side, sum k_i)     vectors
S       their singular values, weighted                         (sum k_i,)          values
w_i     weights                                                 (sources,)          weights
lambda  `scaling`

Updates of orthogonal tasks are summed, updates of one direction averaged: what tasks share is not counted twice, and what they
would write over each other is turned apart.

The paper keeps min(out, in) / n ranks. A low-rank update is kept whole where all fit beside each other. Differs from the paper:
sources have weights, and directions whose squared length in U^T U is below 1e-6 of the largest are left out of equation 3, since
two copies of one vector would be torn apart by rounding. Tensors that are no matrix are averaged, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from compresskit.task_vectors.merging.method import MergeMethod, Values, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

SAME_DIRECTION = 1e-6
"""Eigenvalues of U^T U below this share of the largest belong to copies of one direction; far above float64's rounding."""


def nearest_orthogonal(vectors: Tensor) -> Tensor:
    """Equation 3: (side, ranks) float64 -> the same shape, with orthonormal columns as far as they are independent."""
    import torch

    from compresskit.numerics.factorised import in_one_thread

    values, basis = in_one_thread(torch.linalg.eigh, vectors.T @ vectors)
    inverse = torch.where(values > SAME_DIRECTION * values[-1], values, torch.inf).rsqrt()
    found: Tensor = vectors @ ((basis * inverse) @ basis.T)
    return found


class TSV(MergeMethod, frozen=True):
    """Equations 1 to 4."""

    of_matrices: ClassVar[bool] = True

    def merge(self, values: Values, weights: Values) -> Values:
        """Mean, for tensors that are no matrix: (sources, entries), (sources,) -> (entries,)."""
        mean: Values = weighted_sum(values, weights) / weights.sum(dtype=np.float32)
        return mean

    def ranks(self, ranks: Sequence[int], shape: tuple[int, int], sources: int) -> list[int]:
        """Ranks to keep of updates (out, in) of these ranks: all where they fit beside each other, else equal shares."""
        side = min(shape)
        return list(ranks) if sum(ranks) <= side else [min(rank, max(1, side // sources)) for rank in ranks]

    def merge_pairs(self, pairs: Sequence[tuple[Tensor, Tensor]], weights: Values, sources: int) -> tuple[Tensor, Tensor]:
        """Equations 1 to 4 without `scaling`: pairs A (r_i, in), B (out, r_i) of one weight -> A (k, in), B (out, k) float64."""
        import torch

        from compresskit.numerics.lowrank import SMALLEST, balanced_factors

        exact = [(first.double(), second.double()) for first, second in pairs]
        balanced = [balanced_factors(*pair) for pair in exact]
        halves = [second.norm(dim=0) for _, second in balanced]
        ranks = [int((half > SMALLEST**0.5 * half.max()).sum()) for half in halves]  # half**2 are the singular values
        kept = self.ranks(ranks, (len(exact[0][1]), exact[0][0].shape[1]), sources)
        if not sum(kept):
            return exact[0][0][:0], exact[0][1][:, :0]
        left = torch.cat([second[:, :k] / half[:k] for k, half, (_, second) in zip(kept, halves, balanced, strict=True)], dim=1)
        right = torch.cat(
            [(first[:k] / half[:k, None]).T for k, half, (first, _) in zip(kept, halves, balanced, strict=True)], dim=1
        )
        values = torch.cat([float(w) * half[:k] ** 2 for w, k, half in zip(weights, kept, halves, strict=True)])
        return values[:, None] * nearest_orthogonal(right).T, nearest_orthogonal(left)
