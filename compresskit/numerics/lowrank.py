"""Low-rank factors of a weight's error: the best pair for given inputs, and its gains by rank.

    minimise ||(D - B A) X^T||_F  over pairs of rank r                              (EoRA, arXiv 2410.21271, section 3.2)
    C = X^T X / tokens = P P^T;   D P = U S V^T;   B = U_r S_r^1/2,   A = S_r^1/2 V_r^T P^-1                          (4)

symbol  meaning                                  shape               name here
D       error to repair                          (out, in)           residual
C       second moments of the inputs             (in, in)            metric
U_r     leading left singular vectors of D P     (out, r)            directions
S_r     singular values                          (r,)
B, A    factors                                  (out, r), (r, in)   second, first

Differs from the paper: S_r V_r^T P^-1 is computed as U_r^T D, where U_r are the leading eigenvectors of D C D^T. This needs
no inverse, so it is stable even if C is singular because there are fewer tokens than inputs. All in float64.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from compresskit.numerics.factorised import in_one_thread

EXACT_SIDE = 1024
"""Largest side of a matrix whose eigenvectors are always exact."""
EXACT_SHARE = 8
"""Larger matrices also use the exact method if at least an eighth of the eigenvectors is wanted."""
ROWS_AT_ONCE = 1024
"""Rows that are computed together where nothing but memory depends on it."""
OVERSAMPLE = 16
ITERATIONS = 10
SMALLEST = 1e-12
"""Singular values below this share of the largest count as 0."""


class Metric:
    """Measure of weight errors: C, shared by the linears that share their input."""

    def __init__(self, moments: Tensor, damping: float = 0.0, shrinkage: float = 0.0):
        """`moments`: (in, in), in any float dtype; `damping` times their mean diagonal is added to the diagonal.

        `shrinkage` is the share by which off-diagonal entries shrink. Without float64 (mps) the computation runs on the CPU.
        """
        exact = exactly(moments)
        self.matrix = exact.clone() if exact is moments else exact  # in place, rows by rows: for 11,008 inputs it is a GB
        for start in range(0, len(exact) if shrinkage else 0, ROWS_AT_ONCE):
            part = self.matrix[start : start + ROWS_AT_ONCE]
            diagonal = torch.zeros_like(part)
            diagonal.diagonal(start).copy_(part.diagonal(start))
            part.copy_(part.lerp(diagonal, shrinkage))
        self.matrix.diagonal().add_(damping * self.matrix.diagonal().mean())

    @cached_property
    def root(self) -> Tensor:
        """P of equation 4, (in, in): Q L^1/2 of the eigendecomposition; negative eigenvalues are rounding errors and become 0."""
        values, vectors = in_one_thread(torch.linalg.eigh, self.matrix)
        root: Tensor = vectors * values.clamp_min(0).sqrt()
        return root


def low_rank_factors(
    residual: Tensor, metric: Metric, rank: int, smallest: bool = False, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the best pair, equation 4. residual (out, in). `smallest` takes the least important directions instead.

    `weights` (out,) are positive weights of each output's squared error; by default all are equal.

    Returns:
        (A (rank, in), B (out, rank)), float32 on the residual's device.
    """
    exact = weighted(residual, weights)
    squares, directions = _directions(exact, metric, rank, smallest)
    scale = squares.sqrt().sqrt()
    scale = torch.where(scale > SMALLEST * scale.max(), scale, 1.0)
    first, second = (directions.T @ exact) / scale[:, None], directions * scale
    if weights is not None:
        second /= exactly(weights).to(second.device).sqrt()[:, None]
    return first.to(residual.device, torch.float32).contiguous(), second.to(residual.device, torch.float32).contiguous()


def weighted(residual: Tensor, weights: Tensor | None) -> Tensor:
    """G^1/2 D in float64: its plain error is D's error with outputs weighted by G = diag(weights). residual (out, in)."""
    exact = exactly(residual)
    return exact if weights is None else exact * exactly(weights).to(exact.device).sqrt()[:, None]


def gains(residual: Tensor, metric: Metric) -> Tensor:
    """Reduction of ||(D - B A) X^T||_F^2 / tokens by each further rank, (min(out, in),) float64, falling. residual (out, in)."""
    values: Tensor = in_one_thread(torch.linalg.eigvalsh, _smaller_gram(exactly(residual), metric))
    return values.flip(0).clamp_min(0)


def remaining_error(residual: Tensor, metric: Metric, update: Tensor, weights: Tensor | None = None) -> float:
    """||G^1/2 (D - update) X^T||_F^2 / tokens, for residual and update (out, in); `weights`: those of `weighted`."""
    sums = []
    for start in range(0, len(residual), ROWS_AT_ONCE):  # five float64 copies of the linear at once would be the peak
        rows = slice(start, start + ROWS_AT_ONCE)
        own = None if weights is None else weights[rows]
        left = weighted(residual[rows], own) - weighted(update[rows], own)
        sums.append((left @ metric.matrix * left).sum(dim=1))
    return float(torch.cat(sums).sum())


def leading_eigenvectors(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Compute the largest eigenvalues and their vectors of a positive semidefinite matrix (n, n).

    Exact, or by subspace iteration (Halko et al., arXiv 0909.4061) if the matrix is large and few are wanted.

    Returns:
        (values (count,) falling, vectors (n, count)), in the matrix's dtype and on its device.
    """
    side = len(matrix)
    if side <= EXACT_SIDE or count * EXACT_SHARE >= side:
        values, vectors = in_one_thread(torch.linalg.eigh, matrix)
        return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(side, count + OVERSAMPLE, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = in_one_thread(torch.linalg.qr, matrix @ start).Q
    for _ in range(ITERATIONS):
        basis = in_one_thread(torch.linalg.qr, matrix @ basis).Q
    values, vectors = in_one_thread(torch.linalg.eigh, basis.T @ matrix @ basis)
    return values.flip(0)[:count].clamp_min(0), basis @ vectors.flip(1)[:, :count]


def balanced_factors(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Balance the factors of a product B A = U S V^T: B' = U S^1/2, A' = S^1/2 V^T.

    first A (r, in), second B (out, r), in float32 or float64. Any invertible mixing of a pair's ranks gives the same update;
    this pair has the smallest sum of squares. The largest entry of each row of A' is positive, so that the signs do not
    depend on the solver.

    Returns:
        (A' (r, in), B' (out, r)) in the dtype of the given factors, with falling singular values.
    """
    left, left_part = in_one_thread(torch.linalg.qr, second)
    right, right_part = in_one_thread(torch.linalg.qr, first.T)
    u, values, vh = in_one_thread(torch.linalg.svd, left_part @ right_part.T, full_matrices=False)
    half = values.sqrt()
    new_first, new_second = half[:, None] * (vh @ right.T), (left @ u) * half
    if new_first.shape[0] < first.shape[0]:  # more ranks than rows or columns: the rest is zero
        missing = first.shape[0] - new_first.shape[0]
        new_first = torch.nn.functional.pad(new_first, (0, 0, 0, missing))
        new_second = torch.nn.functional.pad(new_second, (0, missing))
    largest = new_first.gather(1, new_first.abs().argmax(dim=1, keepdim=True))
    flip = torch.where(largest < 0, -1.0, 1.0).to(first.dtype)
    return (flip * new_first).contiguous(), (new_second * flip.T).contiguous()


def _directions(residual: Tensor, metric: Metric, rank: int, smallest: bool) -> tuple[Tensor, Tensor]:
    """(squared singular values, left singular vectors) of D P, from the smaller of its two Gram matrices."""
    gram = _smaller_gram(residual, metric)
    if smallest:
        values, every = in_one_thread(torch.linalg.eigh, gram)
        squares, vectors = values[:rank].clamp_min(0), every[:, :rank]
    else:
        squares, vectors = leading_eigenvectors(gram, rank)
    if residual.shape[0] <= residual.shape[1]:
        return squares, vectors
    # D P V = U S has orthogonal columns; QR normalises them, including those with singular value 0.
    return squares, in_one_thread(torch.linalg.qr, residual @ (metric.root @ vectors)).Q


def _smaller_gram(residual: Tensor, metric: Metric) -> Tensor:
    """D C D^T (out, out), or P^T D^T D P (in, in) if smaller; both have the squared singular values of D P as eigenvalues."""
    if residual.shape[0] <= residual.shape[1]:
        return residual @ metric.matrix @ residual.T
    product = residual @ metric.root
    return product.T @ product


def exactly(tensor: Tensor) -> Tensor:
    """The tensor in float64, on the CPU where its device has none."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device).double()
