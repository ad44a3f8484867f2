"""Low-rank factors stored in float8 e4m3: rounding a pair, and solving for the best rounded pair.

    update = scale * B A,    A_k / p_k and B_k p_k / scale in 8 bits for each rank k, p_k a power of two             (1)

symbol  meaning                                  shape               name here
D, C    error to repair, moments of the inputs   see lowrank.py      residual, metric
A, B    factors                                  (r, in), (out, r)   first, second
G       weights of the outputs' squared errors   (out,)              weights

The scale is the same for all linears of an adapter, because it is what `lora_alpha` can say, and clients read no other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.errors import NumericalError
from compresskit.numerics.factorised import in_one_thread
from compresskit.numerics.lowrank import Metric, exactly, low_rank_factors, remaining_error, weighted

EIGHT_BITS = torch.float8_e4m3fn
EIGHT_BIT_LARGEST = 256.0
"""Largest entry of either factor in 8 bits, to within the square root of 2; the format ends at 448."""
EIGHT_BIT_LEAST = 2.0**-3
"""Root mean square of a factor's rank below which its entries begin to lose mantissa bits."""
EIGHT_BIT_ROUNDS = 2
SMALLEST_EIGENVALUE = 1e-9
"""Directions below this share of the largest eigenvalue are not solved for: the inputs hardly contain them."""


def eight_bit_factors(
    residual: Tensor, metric: Metric, rank: int, scale: float, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute an 8-bit pair with update = scale * B A, solving each factor again given the rounded other. residual (out, in).

    Given A: B = D C A^T (A C A^T)^-1, for any weights. Given B: A = (B^T G B)^-1 B^T G D, G = diag(weights), for any inputs.
    The best pair of all rounds is kept.

    Returns:
        (A (rank, in), B (out, rank)) in float8 e4m3 on the residual's device.

    Raises:
        NumericalError: see `in_eight_bits`.
    """
    exact, counted = exactly(residual), weighted(residual, weights)
    first, second = (exactly(factor) for factor in low_rank_factors(residual, metric, rank, weights=weights))
    best: tuple[float, Tensor, Tensor] | None = None
    for _ in range(EIGHT_BIT_ROUNDS):
        rows = rounded_pair(first, second, scale)[0]
        second = _solved(rows @ metric.matrix @ rows.T, rows @ metric.matrix @ exact.T).T
        small_first, small_second = in_eight_bits(rows, second, scale)
        columns = weighted(scale * small_second.double(), weights)
        error = remaining_error(counted, metric, columns @ small_first.double())
        if best is None or error < best[0]:
            best = (error, small_first, small_second)
        columns = weighted(rounded_pair(rows, second, scale)[1], weights)
        first = _solved(columns.T @ columns, columns.T @ counted)
    assert best is not None
    return best[1].to(residual.device), best[2].to(residual.device)


def in_eight_bits(first: Tensor, second: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Round a pair, A (rank, in) and B (out, rank), to 8 bits; update = scale * B A.

    `scale` is the same for all pairs of an adapter. What a rank's pair needs beside it is a power of two that divides A's row
    and multiplies B's column, so that the entries of both lie where the format is fine.

    Returns:
        (A, B) in float8 e4m3.

    Raises:
        NumericalError: the product of the largest entries is above 65,536 scales.
    """
    return _rounded(first, second, scale)[:2]


def rounded_pair(first: Tensor, second: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Round A (rank, in) and B (out, rank) by `in_eight_bits` and scale them back; their product is the stored one."""
    small_first, small_second, powers = _rounded(first, second, scale)
    return small_first.to(first) * powers, small_second.to(second) * (scale / powers.T)


def _rounded(first: Tensor, second: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A, B in 8 bits, the powers (rank, 1) of equation 1)."""
    powers = _eight_bit_powers(first, second, scale)
    return (first / powers).to(EIGHT_BITS), (second * (powers.T / scale)).to(EIGHT_BITS), powers


def _eight_bit_powers(first: Tensor, second: Tensor, scale: float) -> Tensor:
    """The powers of two, (rank, 1), that divide A's rows and multiply B's columns."""
    rows, columns = first, second.T / scale
    tops, bottoms = (each.abs().amax(dim=1, keepdim=True) for each in (rows, columns))
    if bool((tops * bottoms > EIGHT_BIT_LARGEST**2).any()):
        largest = float((tops * bottoms).max()) * scale
        raise NumericalError(f"an update with entries up to {largest:.3g} is too large for factors in 8 bits; store them in 16")
    # Between these bounds nothing overflows; between the closer ones no factor loses bits.
    least, most = tops / EIGHT_BIT_LARGEST, EIGHT_BIT_LARGEST / bottoms
    means = (each.square().mean(dim=1, keepdim=True).sqrt() for each in (rows, columns))
    fine_most, fine_least = next(means) / EIGHT_BIT_LEAST, EIGHT_BIT_LEAST / next(means)
    middle = torch.sqrt(torch.maximum(least, fine_least)) * torch.sqrt(torch.minimum(most, fine_most))
    middle = torch.where(bottoms == 0, fine_most, torch.where(tops == 0, fine_least, middle)).clamp(least, most)
    return torch.where(middle.isfinite() & (middle > 0), torch.exp2(torch.round(torch.log2(middle))), 1.0)


def _solved(matrix: Tensor, right: Tensor) -> Tensor:
    """Compute matrix^-1 right for a symmetric matrix that may be singular."""
    inverse: Tensor = in_one_thread(torch.linalg.pinv, matrix, rtol=SMALLEST_EIGENVALUE, hermitian=True)
    return inverse @ right
