"""evaluation/nuclear_norm.py: against a loop that states the definition in float64. Oracle and property tests."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.evaluation.nuclear_norm import matrix_entropy, matrix_nuclear_norm


def naive(hidden: torch.Tensor) -> float:
    rows = hidden.double().numpy().copy()
    tokens, features = rows.shape
    for j in range(features):
        rows[:, j] -= math.fsum(rows[:, j]) / tokens
    for i in range(tokens):
        length = math.sqrt(math.fsum(x * x for x in rows[i]))
        if length > 0:
            rows[i] /= length
    norms = sorted((math.sqrt(math.fsum(x * x for x in rows[:, j])) for j in range(features)), reverse=True)
    return math.fsum(norms[: min(tokens, features)]) / tokens


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(2, 150),
    features=st.integers(1, 40),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    offset=st.sampled_from([0.0, 1.0, 300.0]),
)
def test_it_equals_the_definition_stated_naively(tokens: int, features: int, seed: int, scale: float, offset: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(tokens, features, generator=generator) + offset * torch.randn(features, generator=generator)) * scale
    assert matrix_nuclear_norm(hidden) == pytest.approx(naive(hidden), rel=1e-5)


def test_more_features_than_tokens_keeps_only_as_many_columns_as_tokens() -> None:
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert matrix_nuclear_norm(hidden) == pytest.approx(naive(hidden), rel=1e-5)


def test_equal_tokens_carry_nothing() -> None:
    assert matrix_nuclear_norm(torch.full((7, 3), 0.1)) == 0.0


def test_scale_and_shift_do_not_matter() -> None:
    hidden = torch.randn(30, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert matrix_nuclear_norm(5 * hidden + 3) == pytest.approx(matrix_nuclear_norm(hidden), rel=1e-9)


def test_half_precision_is_measured_as_it_is_stored() -> None:
    hidden = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert matrix_nuclear_norm(hidden) == pytest.approx(naive(hidden), rel=1e-5)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_matrix_entropy_equals_the_entropy_of_the_squared_singular_values(shape: tuple[int, int]) -> None:
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = hidden.double().numpy()
    rows = rows - rows.mean(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    shares = np.linalg.svd(rows, compute_uv=False) ** 2
    shares = shares[shares > 1e-12] / shares.sum()
    assert matrix_entropy(hidden) == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-4)
