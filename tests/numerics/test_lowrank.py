"""numerics/lowrank.py: the pair is the optimum of the output error, by singular values and by descent. Oracle."""

from __future__ import annotations

import pytest
import torch
from low_rank_problems import SHAPES, moments, problem

from compresskit.numerics.lowrank import (
    Metric,
    balanced_factors,
    gains,
    leading_eigenvectors,
    low_rank_factors,
    remaining_error,
    weighted,
)


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize("shape", SHAPES)
def test_its_error_is_that_of_the_best_approximation_of_the_outputs(rank: int, shape: tuple[int, int]) -> None:
    """The outputs D X^T have singular values s; no pair of rank r leaves less than the sum of the squares after the r-th."""
    residual, x = problem(200, shape[0])
    first, second = low_rank_factors(residual, moments(x), rank)
    left = ((residual - second.double() @ first.double()) @ x.T).square().sum()
    values = torch.linalg.svdvals(residual @ x.T)
    optimum = values[rank:].square().sum()
    assert abs(left - optimum) < 1e-6 * values.square().sum()
    assert first.shape == (rank, 12)
    assert second.shape == (shape[0], rank)


def test_no_pair_found_by_200_restarts_of_gradient_descent_is_better() -> None:
    residual, x = problem(60)
    metric = moments(x)
    first, second = low_rank_factors(residual, metric, 2)
    ours = remaining_error(residual, metric, second @ first)
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(200, 2, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(200, 7, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    for _ in range(400):
        left = residual - b @ a
        errors = (left @ metric.matrix * left).sum(dim=(1, 2))
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
    assert ours <= float(errors.detach().min()) * (1 + 1e-6)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_weighed_outputs_get_the_best_approximation_of_the_weighed_outputs(rank: int, shape: tuple[int, int]) -> None:
    residual, x = problem(200, shape[0])
    weights = torch.logspace(-3, 2, shape[0], dtype=torch.float64)
    first, second = low_rank_factors(residual, moments(x), rank, weights=weights)
    left = weights.sqrt()[:, None] * (residual - second.double() @ first.double()) @ x.T
    values = torch.linalg.svdvals(weights.sqrt()[:, None] * residual @ x.T)
    assert abs(left.square().sum() - values[rank:].square().sum()) < 1e-6 * values.square().sum()
    assert torch.allclose(weighted(residual, weights) @ x.T, weights.sqrt()[:, None] * residual @ x.T)
    assert torch.equal(weighted(residual, None), residual)


def test_shrinkage_takes_a_share_of_what_is_off_the_diagonal() -> None:
    _, x = problem(50)
    matrix = x.T @ x
    found = Metric(matrix, shrinkage=0.25).matrix
    assert torch.allclose(found, 0.75 * matrix + 0.25 * torch.diag(matrix.diagonal()))
    assert torch.equal(Metric(matrix).matrix, matrix)
    assert torch.equal(Metric(matrix, shrinkage=1).matrix, torch.diag(matrix.diagonal()))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gains_are_what_each_further_rank_takes_off(shape: tuple[int, int]) -> None:
    residual, x = problem(100, shape[0])
    metric = moments(x)
    found = gains(residual, metric)
    lefts = [remaining_error(residual, metric, torch.zeros_like(residual))]
    for rank in range(1, len(found) + 1):
        first, second = low_rank_factors(residual, metric, rank)
        lefts.append(remaining_error(residual, metric, second @ first))
    steps = torch.tensor(lefts[:-1]) - torch.tensor(lefts[1:])
    assert torch.allclose(found, steps.double(), atol=1e-5 * lefts[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_restores_the_residual(shape: tuple[int, int]) -> None:
    residual, x = problem(200, shape[0])
    first, second = low_rank_factors(residual, moments(x), min(shape))
    assert torch.allclose((second @ first).double(), residual, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_fewer_tokens_than_inputs_do_not_explode(shape: tuple[int, int], damping: float) -> None:
    residual, x = problem(4, shape[0])
    metric = Metric(x.T @ x / len(x), damping)
    for rank in (3, min(shape)):
        first, second = low_rank_factors(residual, metric, rank)
        assert float((second @ first).norm()) <= float(residual.norm()) * (1 + 1e-5)


def test_an_error_of_zero_gives_a_pair_of_zero() -> None:
    _, x = problem(50)
    residual = torch.zeros(7, 12)
    first, second = low_rank_factors(residual, moments(x), 2)
    assert not bool((second @ first).any())


def test_subspace_iteration_finds_the_energy_of_the_exact_eigenvectors() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(1100, 1100, generator=generator, dtype=torch.float64)).Q
    spectrum = 1 / torch.arange(1, 1101, dtype=torch.float64)
    matrix = basis @ (spectrum[:, None] * basis.T)
    values, vectors = leading_eigenvectors(matrix, 32)
    captured = (vectors.T @ matrix @ vectors).diagonal().sum()
    assert abs(captured - spectrum[:32].sum()) < 1e-6 * spectrum[:32].sum()
    assert torch.allclose(values, spectrum[:32], rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [False, True])
def test_corda_s_pair_is_its_paper_s_definition(shape: tuple[int, int], smallest: bool) -> None:
    """W C = U S V^T; the pair of r components is U_r S_r V_r^T C^-1, the largest or the smallest (arXiv 2406.05223)."""
    weight, x = problem(200, shape[0])
    moments = x.T @ x / len(x)
    left, values, right = torch.linalg.svd(weight @ moments, full_matrices=False)
    chosen = slice(-3, None) if smallest else slice(0, 3)
    wanted = left[:, chosen] * values[chosen] @ right[chosen] @ torch.linalg.inv(moments)
    first, second = low_rank_factors(weight, Metric(moments @ moments), 3, smallest)
    assert torch.allclose((second @ first).double(), wanted, atol=1e-3 * float(wanted.norm()))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(20, 30, 4), (30, 20, 8), (5, 40, 8), (8, 3, 6)])
def test_a_balanced_pair_is_the_same_update_with_equal_parts(rows: int, columns: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    first, second = torch.randn(rank, columns, generator=generator), 0.01 * torch.randn(rows, rank, generator=generator)
    new_first, new_second = balanced_factors(first.double(), second.double())
    assert new_first.shape == first.shape
    assert new_second.shape == second.shape
    torch.testing.assert_close(new_second @ new_first, second.double() @ first.double())
    torch.testing.assert_close(new_first.square().sum(dim=1), new_second.square().sum(dim=0))


def test_a_pair_that_changes_nothing_balances_to_zeros() -> None:
    first, second = balanced_factors(torch.randn(4, 10), torch.zeros(12, 4))
    assert not (second @ first).any()
    assert first.isfinite().all()
