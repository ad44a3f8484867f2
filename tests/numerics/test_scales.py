"""numerics/scales.py: what a stored scale is of any size. Oracle: numpy's conversions to half."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.numerics.grid import from_codes, min_max_grid, to_codes
from compresskit.numerics.scales import rounded_scale
from compresskit.numerics.scheme import Scheme

NORMAL, STEP = 2**-14, 2**-24
"""The smallest normal half, and the smallest half."""


@given(st.floats(NORMAL, 60000.0))
def test_a_scale_that_is_a_normal_half_is_rounded_to_the_nearest(value: float) -> None:
    exact = torch.tensor([value], dtype=torch.float32)
    assert float(rounded_scale(exact, torch.float16)) == float(np.float16(exact.item()))


@given(st.floats(1e-12, NORMAL))
def test_a_smaller_scale_is_the_next_half_above(value: float) -> None:
    exact = torch.tensor([value], dtype=torch.float32)
    found = float(rounded_scale(exact, torch.float16))
    assert found == float(np.float16(found))
    assert exact.item() <= found < exact.item() + STEP


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_group_without_weights_keeps_a_scale_that_can_divide(dtype: torch.dtype) -> None:
    assert float(rounded_scale(torch.zeros(1), dtype)) == torch.finfo(dtype).smallest_normal
    assert float(rounded_scale(torch.full((1,), 1e9), torch.float16)) == torch.finfo(torch.float16).max


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [1e-3, 1e-4, 1e-5])
def test_weights_of_any_size_keep_the_precision_of_large_ones(bits: int, symmetric: bool, size: float) -> None:
    """Scales were at least 6.1e-5: of weights of 1e-5 nothing was left at 4 bits."""
    scheme, weight = Scheme(bits, 16, symmetric), torch.randn(8, 64, generator=torch.Generator().manual_seed(0))

    def lost(weight: torch.Tensor) -> float:
        grid = min_max_grid(weight, scheme, torch.float16)
        return float((from_codes(to_codes(weight, grid, scheme), grid, scheme, torch.float16) - weight).norm() / weight.norm())

    # Near 1e-5 a scale at 8 bits is a step or two of 6e-8, as the weights are that a half can hold at all.
    nearest = float(((weight * size).half().float() - weight * size).norm() / (weight * size).norm())
    assert lost(weight * size) < 1.1 * lost(weight) + 2 * nearest
