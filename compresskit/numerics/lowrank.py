"""Low-rank factors of a weight's error: the best pair for given inputs, its gains by rank, and the pair in 8 bits.

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
OVERSAMPLE = 16
ITERATIONS = 10
SMALLEST = 1e-12
"""Singular values below this share of the largest count as 0."""
SMALLEST_EIGENVALUE = 1e-9
"""Directions below this share of the largest eigenvalue are not solved for: the inputs hardly contain them."""
EIGHT_BITS = torch.float8_e4m3fn
EIGHT_BIT_SPREAD = 8.0
"""Upper bound on the root mean square of a row of A in 8 bits; half of it is the lower bound, except for rows with a massive
entry. Entries down to a five-hundredth of this value keep all mantissa bits."""
EIGHT_BIT_LARGEST = 256.0
"""Largest entry of either factor in 8 bits; the format ends at 448."""
EIGHT_BIT_ROUNDS = 2


class Metric:
    """Measure of weight errors: C, shared by the linears that share their input."""

    def __init__(self, moments: Tensor, damping: float = 0.0, shrinkage: float = 0.0):
        """`moments`: (in, in), in any float dtype; `damping` times their mean diagonal is added to the diagonal.

        `shrinkage` is the share by which off-diagonal entries shrink. Without float64 (mps) the computation runs on the CPU.
        """
        exact = _exact(moments)
        self.matrix = exact.lerp(torch.diag(exact.diagonal()), shrinkage)
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
        second /= _exact(weights).to(second.device).sqrt()[:, None]
    return first.to(residual.device, torch.float32).contiguous(), second.to(residual.device, torch.float32).contiguous()


def weighted(residual: Tensor, weights: Tensor | None) -> Tensor:
    """G^1/2 D in float64: its plain error is D's error with outputs weighted by G = diag(weights). residual (out, in)."""
    exact = _exact(residual)
    return exact if weights is None else exact * _exact(weights).to(exact.device).sqrt()[:, None]


def gains(residual: Tensor, metric: Metric) -> Tensor:
    """Reduction of ||(D - B A) X^T||_F^2 / tokens by each further rank, (min(out, in),) float64, falling. residual (out, in)."""
    values: Tensor = in_one_thread(torch.linalg.eigvalsh, _smaller_gram(_exact(residual), metric))
    return values.flip(0).clamp_min(0)


def remaining_error(residual: Tensor, metric: Metric, update: Tensor) -> float:
    """||(D - update) X^T||_F^2 / tokens, for residual and update (out, in)."""
    left = _exact(residual) - _exact(update)
    return float((left @ metric.matrix * left).sum(dim=1).sum())


def eight_bit_factors(residual: Tensor, metric: Metric, rank: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
    """Compute an 8-bit pair with update = scale * B A, solving each factor again given the rounded other. residual (out, in).

    Given A: B = D C A^T (A C A^T)^-1, for any weights. Given B: A = (B^T G B)^-1 B^T G D, G = diag(weights), for any inputs.
    The best pair of all rounds is kept.

    Returns:
        (A (rank, in), B (out, rank), scale), the factors in float8 e4m3 on the residual's device.
    """
    first, _ = low_rank_factors(residual, metric, rank, weights=weights)
    exact, counted = _exact(residual), weighted(residual, weights)
    best: tuple[float, Tensor, Tensor, float] | None = None
    for _ in range(EIGHT_BIT_ROUNDS):
        small_first, _ = _eight_bit_rows(_exact(first))
        rows = small_first.double()
        second = _solved(rows @ metric.matrix @ rows.T, rows @ metric.matrix @ exact.T).T
        small_second, scale = _eight_bit_columns(second)
        columns = weighted(small_second, weights)
        error = remaining_error(counted, metric, scale * (columns @ rows))
        if best is None or error < best[0]:
            best = (error, small_first, small_second, scale)
        first = _solved(columns.T @ columns, columns.T @ counted)
    assert best is not None
    return best[1].to(residual.device), best[2].to(residual.device), best[3]


def in_eight_bits(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, float]:
    """Round a pair, A (rank, in) and B (out, rank), to 8 bits; update = scale * B A.

    All multipliers are powers of two, so rounding a rounded pair again changes nothing.

    Returns:
        (A, B, scale), the factors in float8 e4m3.
    """
    return _eight_bit_pair(first, second)[:3]


def rounded_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Round A (rank, in) and B (out, rank) by `in_eight_bits` and scale them back; their product is the stored one."""
    small_first, small_second, scale, powers = _eight_bit_pair(first, second)
    return small_first.to(first) * powers, small_second.to(second) * scale / powers.T


def _eight_bit_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, float, Tensor]:
    """(A, B, scale) of `in_eight_bits`, and the powers (rank, 1) that divided A's rows and multiplied B's columns."""
    small_first, powers = _eight_bit_rows(first)
    small_second, scale = _eight_bit_columns(second * powers.T)
    return small_first, small_second, scale, powers


def _eight_bit_rows(first: Tensor) -> tuple[Tensor, Tensor]:
    """(A (rank, in) / powers in 8 bits, powers (rank, 1)): row root mean squares up to 8, no entry above the largest."""
    spread = first.square().mean(dim=1, keepdim=True).sqrt() / EIGHT_BIT_SPREAD
    powers = _power_of_two(torch.maximum(spread, first.abs().amax(dim=1, keepdim=True) / EIGHT_BIT_LARGEST))
    return (first / powers).to(EIGHT_BITS), powers


def _eight_bit_columns(second: Tensor) -> tuple[Tensor, float]:
    """(B (out, rank) / scale in 8 bits, scale)."""
    scale = _power_of_two(second.abs().max() / EIGHT_BIT_LARGEST)
    return (second / scale).to(EIGHT_BITS), float(scale)


def _power_of_two(least: Tensor) -> Tensor:
    """Round up to powers of two; 0 gives 1."""
    return torch.where(least > 0, torch.exp2(torch.ceil(torch.log2(least))), 1.0)


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


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Compute matrix^-1 right for a symmetric matrix that may be singular."""
    inverse: Tensor = in_one_thread(torch.linalg.pinv, matrix, rtol=SMALLEST_EIGENVALUE, hermitian=True)
    return inverse @ right


def _exact(tensor: Tensor) -> Tensor:
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device).double()
