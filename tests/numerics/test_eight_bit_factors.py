"""numerics/eight_bit_factors.py: what a pair in float8 loses, and what it refuses. Oracle, property tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank_problems import SHAPES, moments, problem

from compresskit.errors import NumericalError
from compresskit.numerics.eight_bit_factors import eight_bit_factors, in_eight_bits, rounded_pair
from compresskit.numerics.lowrank import Metric, low_rank_factors, remaining_error, weighted

SCALE = 2.0**-12


@pytest.mark.parametrize("shape", SHAPES)
def test_a_pair_in_eight_bits_knows_which_outputs_count(shape: tuple[int, int]) -> None:
    residual, x = problem(200, shape[0])
    weights = torch.logspace(-3, 2, shape[0], dtype=torch.float64)
    errors = []
    for counted in (weights, None):
        first, second = eight_bit_factors(residual, moments(x), 3, SCALE, counted)
        update = SCALE * second.double() @ first.double()
        errors.append(remaining_error(weighted(residual, weights), moments(x), weighted(update, weights)))
    exact = low_rank_factors(residual, moments(x), 3, weights=weights)
    best = remaining_error(weighted(residual, weights), moments(x), weighted(exact[1].double() @ exact[0].double(), weights))
    assert best <= errors[0] * (1 + 1e-6)
    assert errors[0] < errors[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_eight_bits_lose_little_of_what_sixteen_win(shape: tuple[int, int]) -> None:
    residual, x = problem(200, shape[0])
    residual = residual * 1e-3
    metric = moments(x)
    first, second = low_rank_factors(residual, metric, 3)
    small_first, small_second = eight_bit_factors(residual, metric, 3, SCALE)
    nothing = remaining_error(residual, metric, torch.zeros_like(residual))
    exact = nothing - remaining_error(residual, metric, second @ first)
    rounded = nothing - remaining_error(residual, metric, SCALE * small_second.float() @ small_first.float())
    assert rounded > 0.99 * exact
    assert small_first.dtype == small_second.dtype == torch.float8_e4m3fn


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.integers(-30, 30), st.integers(3, 9), st.integers(0, 2**31))
def test_a_pair_in_eight_bits_is_near_however_its_size_is_shared_between_the_factors(
    rank: int, columns: int, rows: int, power: int, size: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(rank, columns, generator=generator) * 2.0**power
    second = torch.randn(rows, rank, generator=generator) * torch.randn(rank, generator=generator) * 2.0 ** (-power - size)
    small_first, small_second = in_eight_bits(first, second, SCALE)
    a, b = rounded_pair(first, second, SCALE)
    product = SCALE * small_second.float() @ small_first.float()
    assert torch.allclose(product, b @ a, rtol=1e-5, atol=1e-6 * float((b @ a).abs().max()))
    for exact, rounded, small in ((first, a, small_first), (second.T, b.T, small_second.T)):  # rank by rank
        largest = exact.abs().amax(dim=1, keepdim=True)
        finest = largest / small.float().abs().amax(dim=1, keepdim=True).clamp_min(2**-9) * 2**-9  # the format's smallest step
        assert bool(((rounded - exact).abs() <= exact.abs() / 16 + finest).all())


def test_a_factor_that_starts_at_zero_leaves_the_other_as_it_is() -> None:
    first, nothing = torch.tensor([[0.5, -4.0]]), torch.zeros(3, 1)
    assert torch.equal(rounded_pair(first, nothing, SCALE)[0], first)
    assert torch.equal(rounded_pair(nothing.T, first.T, SCALE)[1], first.T)
    assert not bool(rounded_pair(first, nothing, SCALE)[1].any())


def test_an_update_too_large_for_eight_bits_is_refused_with_its_size() -> None:
    with pytest.raises(NumericalError, match=r"up to 20 is too large for factors in 8 bits"):
        in_eight_bits(torch.tensor([[5.0]]), torch.tensor([[4.0]]), SCALE)
    assert float(in_eight_bits(torch.tensor([[1.0]]), torch.tensor([[4.0]]), SCALE)[0]) > 0


def test_one_massive_entry_among_thousands_stays_finite_in_eight_bits() -> None:
    first = torch.full((1, 8192), 1e-3)
    first[0, 7] = 1.0
    for factor in in_eight_bits(first, torch.ones(4, 1), SCALE):
        assert bool(factor.float().isfinite().all())


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_tokens_than_inputs_do_not_explode(shape: tuple[int, int]) -> None:
    residual, x = problem(4, shape[0])
    metric = Metric(x.T @ x / len(x), 0.01)  # the factors are solved for, which takes a metric that sees every direction
    first, second = eight_bit_factors(residual, metric, min(shape), SCALE)
    assert float((SCALE * second.float() @ first.float()).norm()) < 2 * float(residual.norm())


def test_an_error_of_zero_gives_a_pair_of_zero() -> None:
    _, x = problem(50)
    first, second = eight_bit_factors(torch.zeros(7, 12), moments(x), 2, SCALE)
    assert not bool((SCALE * second.float() @ first.float()).any())
