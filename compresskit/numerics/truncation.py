"""Truncated singular value decompositions as balanced factors B A: of a dense matrix, and of a product of factors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from compresskit.numerics.factorised import in_one_thread
from compresskit.numerics.lowrank import balanced_factors


def truncated(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the best product of that rank, balanced; exact if the update (out, in) has no larger rank.

    The singular vectors come from the smaller second-moment matrix in float64, four times as fast as a decomposition.

    Returns:
        (A (rank, in), B (out, rank)) float32.
    """
    wide = update.shape[0] <= update.shape[1]
    exact = update.double() if wide else update.double().T
    basis = in_one_thread(torch.linalg.eigh, exact @ exact.T).eigenvectors[:, -rank:]
    first, second = basis.T @ exact, basis
    first, second = (first, second) if wide else (second.T, first.T)
    first, second = balanced_factors(first, second)
    return first.float(), second.float()


def truncated_product(first: Tensor, second: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the best product of that rank of B A, balanced, without forming B A. A (r, in), B (out, r) float64.

    Returns:
        (A' (rank, in), B' (out, rank)) float32; ranks beyond r are 0.
    """
    first, second = balanced_factors(first, second)
    missing = max(0, rank - len(first))
    first, second = functional.pad(first[:rank], (0, 0, 0, missing)), functional.pad(second[:, :rank], (0, missing))
    return first.float(), second.float()
