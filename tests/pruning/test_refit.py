"""pruning/refit.py: against an independent least-squares solver (oracle), and never worse than without (property)."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.pruning.refit import refit, squared_output_error


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
    found = refit(down, x.T @ x, kept, removed, ridge=1e-12)
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
    assert torch.allclose(refit(down, gram, kept, removed, 0.01).double(), expected, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 1000), st.integers(1, 11), st.sampled_from([3, 8, 200]), st.sampled_from([0.0001, 0.01, 1.0]))
def test_the_refit_is_never_worse_than_dropping_the_channels(seed: int, count: int, tokens: int, ridge: float) -> None:
    x, down = problem(seed, tokens)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).tolist()
    kept, removed = split(sorted(order[:count]), 12)
    gram = x.T @ x
    refitted, energy = squared_output_error(down, gram, kept, refit(down, gram, kept, removed, ridge))
    dropped, _ = squared_output_error(down, gram, kept, down[:, kept])
    assert refitted <= dropped + 1e-4 * energy


def test_the_output_error_is_the_squared_distance_of_the_outputs() -> None:
    x, down = problem(2)
    kept, _ = split([0, 1, 2], 12)
    new = torch.randn(5, 3)
    error, energy = squared_output_error(down, x.T @ x, kept, new)
    assert abs(error - float((x @ down.T - x[:, kept] @ new.T).square().sum())) < 1e-2 * error
    assert abs(energy - float((x @ down.T).square().sum())) < 1e-2 * energy
