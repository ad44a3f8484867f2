"""walk/statistics.py: sums are exact against a direct computation, and parts add up to the whole. Oracle, property tests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.walk.statistics import AngularDistance, Gram, Moments


@given(st.integers(1, 19), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 99))
def test_the_gram_matrix_of_parts_is_that_of_the_whole(features: int, parts: list[int], seed: int) -> None:
    chunks = [torch.randn(n, features, generator=torch.Generator().manual_seed(seed + i)) for i, n in enumerate(parts)]
    whole, summed = Gram(features), Gram(features)
    for chunk in chunks:
        whole.add(chunk)
        part = Gram(features)
        part.add(chunk)
        summed += part
    x = torch.cat(chunks).double()
    for gram in (whole, summed):
        assert torch.allclose(gram.matrix().double(), x.T @ x, atol=1e-4)
        assert torch.allclose(gram.sum.double(), x.sum(dim=0), atol=1e-4)
        assert torch.allclose(gram.squares.double(), x.square().sum(dim=0), atol=1e-4)
        assert gram.tokens == sum(parts)


def test_moments_of_parts_add_up() -> None:
    x = torch.randn(30, 5)
    first, second = Moments(5), Moments(5)
    first.add(x[:10])
    second.add(x[10:])
    first += second
    assert torch.allclose(first.sum, x.double().sum(dim=0), atol=1e-5)
    assert torch.allclose(first.squares, x.double().square().sum(dim=0), atol=1e-4)
    assert first.tokens == 30


@pytest.mark.parametrize(("angle", "expected"), [(0.0, 0.0), (math.pi / 2, 0.5), (math.pi, 1.0), (math.pi / 3, 1 / 3)])
def test_the_angular_distance_is_the_angle_over_pi(angle: float, expected: float) -> None:
    distance = AngularDistance()
    distance.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[3 * math.cos(angle), 3 * math.sin(angle)]]))
    assert distance.mean == pytest.approx(expected, abs=1e-3)


def test_angular_distances_add_up_over_tokens() -> None:
    before, after = torch.randn(8, 6), torch.randn(8, 6)
    whole, first, second = AngularDistance(), AngularDistance(), AngularDistance()
    whole.add(before, after)
    first.add(before[:3], after[:3])
    second.add(before[3:], after[3:])
    first += second
    assert first.mean == pytest.approx(whole.mean)
