"""walk/statistics.py: sums are exact against a direct computation, and parts add up to the whole. Oracle, property tests."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.walk.statistics import Gram, Moments


@given(st.integers(1, 19), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_the_gram_matrix_is_the_product_whatever_the_order_of_the_parts(features: int, parts: list[int], seed: int) -> None:
    chunks = [torch.randn(n, features, generator=torch.Generator().manual_seed(seed + i)) for i, n in enumerate(parts)]
    forward, backward = Gram(features), Gram(features)
    for chunk in chunks:
        forward.add(chunk)
    for chunk in reversed(chunks):
        backward.add(chunk)
    x = torch.cat(chunks).double()
    assert torch.allclose(forward.sum.double(), x.sum(dim=0), atol=1e-4)
    assert torch.allclose(forward.squares.double(), x.square().sum(dim=0), atol=1e-4)
    assert torch.allclose(forward.matrix().double(), x.T @ x, atol=1e-4)
    assert torch.equal(forward.matrix(), backward.matrix()) and torch.equal(forward.sum, backward.sum)
    assert forward.tokens == sum(parts)


def test_moments_are_sums_whatever_the_order_of_the_parts() -> None:
    x = torch.randn(30, 5)
    first, second = Moments(5), Moments(5)
    for part in (x[:10], x[10:]):
        first.add(part)
    for part in (x[10:], x[:10]):
        second.add(part)
    assert torch.allclose(first.sum, x.double().sum(dim=0), atol=1e-5)
    assert torch.allclose(first.squares, x.double().square().sum(dim=0), atol=1e-4)
    assert torch.equal(first.sum, second.sum) and torch.equal(first.squares, second.squares)
    assert first.tokens == 30
