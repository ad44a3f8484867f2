"""The low-rank pair is the optimum of the output error: against a brute-force gradient and the closed form. Oracle tests."""

from __future__ import annotations

import pytest
import torch

from compresskit.lowrank import low_rank_factors


def problem(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    return torch.randn(7, 12, generator=generator), x


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_its_error_is_that_of_the_best_approximation_of_the_outputs(rank: int) -> None:
    """The outputs D X^T have singular values s; no pair of rank r leaves less than the sum of the squares after the r-th."""
    residual, x = problem(200)
    first, second = low_rank_factors(residual, x.T @ x / len(x), rank, 1e-10)
    left = ((residual - second @ first) @ x.T).double().square().sum()
    values = torch.linalg.svdvals((residual @ x.T).double())
    assert abs(left - values[rank:].square().sum()) < 1e-4 * values.square().sum()
    assert first.shape == (rank, 12)
    assert second.shape == (7, rank)


def test_full_rank_restores_the_residual() -> None:
    residual, x = problem(200)
    first, second = low_rank_factors(residual, x.T @ x / len(x), 7, 0.01)
    assert torch.allclose(second @ first, residual, atol=1e-4)


def test_fewer_tokens_than_inputs_give_finite_factors() -> None:
    residual, x = problem(4)
    first, second = low_rank_factors(residual, x.T @ x / len(x), 3, 0.01)
    assert bool(first.isfinite().all())
    assert bool(second.isfinite().all())
