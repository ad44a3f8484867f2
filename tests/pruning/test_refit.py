"""pruning/refit.py: against an independent least-squares solver (oracle), and never worse than without (property)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.pruning.refit import refit


def problem(seed: int, tokens: int = 200, width: int = 12, hidden: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator)
    return torch.randn(tokens, width, generator=generator) @ mixing, torch.randn(hidden, width, generator=generator)


def split(kept: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(kept), torch.tensor([i for i in range(width) if i not in kept])


def test_without_ridge_the_refit_is_the_least_squares_solution() -> None:
    x, down = problem(0)
    kept, removed = split([0, 3, 4, 7, 11], 12)
    expected = torch.linalg.lstsq(x[:, kept].double(), (x @ down.T).double()).solution.T
    found = refit(down, x.T @ x, kept, removed, ridge=1e-12).weight
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_with_ridge_the_refit_solves_the_augmented_regression() -> None:
    """Rows sqrt(eps) I pull towards the old weights; eps is a share of the mean of diag(X^T X)."""
    x, down = problem(1)
    kept, removed = split([1, 2, 5, 9], 12)
    gram = x.T @ x
    eps = float(0.01 * gram.diagonal().mean())
    rows = torch.cat([x[:, kept], eps**0.5 * torch.eye(4)]).double()
    targets = torch.cat([x @ down.T, eps**0.5 * down[:, kept].T]).double()
    expected = torch.linalg.lstsq(rows, targets).solution.T
    assert torch.allclose(refit(down, gram, kept, removed, 0.01).weight.double(), expected, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 1000), st.integers(1, 11), st.sampled_from([3, 8, 200]), st.sampled_from([0.0001, 0.01, 1.0]))
def test_the_refit_is_never_worse_than_dropping_the_channels(seed: int, count: int, tokens: int, ridge: float) -> None:
    x, down = problem(seed, tokens)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
    kept, removed = split(sorted(order[:count]), 12)
    gram = x.T @ x
    found = refit(down, gram, kept, removed, ridge)
    dropped = float((x[:, removed] @ down[:, removed].T).square().sum())
    assert found.error <= dropped + 1e-4 * found.energy


@given(st.integers(0, 1000), st.integers(1, 11), st.sampled_from([3, 8, 200]), st.sampled_from([0.01, 1.0]))
def test_error_and_energy_are_the_squared_distances_of_the_outputs(seed: int, count: int, tokens: int, ridge: float) -> None:
    x, down = problem(seed, tokens)
    kept, removed = split(list(range(count)), 12)
    found = refit(down, x.T @ x, kept, removed, ridge)
    x, down = x.double(), down.double()
    error = float((x @ down.T - x[:, kept] @ found.weight.double().T).square().sum())
    energy = float((x @ down.T).square().sum())
    assert abs(found.error - error) <= 1e-5 * energy + 1e-3 * error
    assert abs(found.energy - energy) <= 1e-4 * energy
