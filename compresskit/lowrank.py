"""Low-rank factors of a weight's error: the best pair for given inputs, and its product.

    minimise ||(D - B A) X^T||_F over rank-r pairs:  P P^T = C = X^T X / tokens;  D P ~= U S V^T (truncated)
    B = U S^1/2,  A = S^1/2 V^T P^-1                                            (EoRA, arXiv 2410.21271, equation 4)

symbol  meaning                               shape        name here
D       error to repair                       (out, in)    residual
C       second moments of the inputs          (in, in)     gram
B, A    factors                               (out, r), (r, in)
"""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank_factors(residual: Tensor, gram: Tensor, rank: int, damping: float) -> tuple[Tensor, Tensor]:
    """(A (rank, in), B (out, rank)) float32, the optimum of the output error. residual (out, in), gram (in, in).

    `damping`: share of the mean second moment added to all; with few tokens C is singular, and P^-1 would explode.
    With P the Cholesky factor of C in place of Q L^1/2 the product B A is the same: P is only unique up to a rotation,
    which the singular value decomposition takes up.
    """
    moments = gram.double().clone()
    moments.diagonal().add_(damping * moments.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny))
    factor = torch.linalg.cholesky(moments)
    left, values, right = torch.linalg.svd(residual.double() @ factor, full_matrices=False)
    half = values[:rank].sqrt()
    second = left[:, :rank] * half
    first = torch.linalg.solve_triangular(factor.T, (half[:, None] * right[:rank]).T, upper=True)
    return first.T.float().contiguous(), second.float().contiguous()


def balanced_factors(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product B A whose parts weigh alike: B' = U S^1/2, A' = S^1/2 V^T with B A = U S V^T.

    first A (r, in), second B (out, r), in float32 or float64; so are the results. A pair and any invertible mixing of its
    rank are one and the same update; of all, this one has the smallest sum of squares. Signs: the largest entry of each
    row of A' is positive, so that the pair does not depend on the solver.
    """
    left, left_part = torch.linalg.qr(second)
    right, right_part = torch.linalg.qr(first.T)
    u, values, vh = torch.linalg.svd(left_part @ right_part.T, full_matrices=False)
    half = values.sqrt()
    new_first, new_second = half[:, None] * (vh @ right.T), (left @ u) * half
    if new_first.shape[0] < first.shape[0]:  # more ranks than rows or columns: the rest is zero
        missing = first.shape[0] - new_first.shape[0]
        new_first = torch.nn.functional.pad(new_first, (0, 0, 0, missing))
        new_second = torch.nn.functional.pad(new_second, (0, missing))
    largest = new_first.gather(1, new_first.abs().argmax(dim=1, keepdim=True))
    flip = torch.where(largest < 0, -1.0, 1.0).to(first.dtype)
    return (flip * new_first).contiguous(), (new_second * flip.T).contiguous()
