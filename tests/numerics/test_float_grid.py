"""numerics/float_grid.py: small floats against their written-out values. Oracle: brute force over all of them."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.numerics.float_grid import nearest_e2m1, nearest_e4m3, scale_exponents

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
"""In the order of the codes, so that every second one has an even mantissa."""
E4M3 = [mantissa * 2.0**-9 for mantissa in range(8)]
E4M3 += [(8 + mantissa) * 2.0 ** (exponent - 10) for exponent in range(1, 16) for mantissa in range(8)][:-1]
"""In the order of the codes, without the one that is no number."""

FLOATS = st.floats(-600, 600, width=32)


def nearest(value: float, magnitudes: list[float]) -> float:
    """By trying all; of two that are equally near the one with the even code."""
    distances = [abs(abs(value) - each) for each in magnitudes]
    least = [code for code, distance in enumerate(distances) if distance == min(distances)]
    return math.copysign(magnitudes[min(least, key=lambda code: code % 2)], value)


@given(st.lists(st.one_of(FLOATS, st.floats(-8, 8, width=32), st.sampled_from([0.25, -0.75, 1.25, 2.5, 3.5, 5.0, 7.0]))))
def test_the_nearest_e2m1_number_is_that_of_the_sixteen(values: list[float]) -> None:
    found = nearest_e2m1(torch.tensor(values))
    assert found.tolist() == [nearest(value, E2M1) for value in values]


@given(st.lists(st.one_of(FLOATS, st.floats(-0.03125, 0.03125, width=32), st.sampled_from(E4M3))))
def test_the_nearest_e4m3_number_is_that_of_all(values: list[float]) -> None:
    assert E4M3[-1] == 448 and E4M3[1] == 2.0**-9
    assert nearest_e4m3(torch.tensor(values)).tolist() == [nearest(value, E4M3) for value in values]


@given(st.lists(st.floats(2.0**-120, 2.0**120, width=32)))
def test_exponents_put_the_largest_into_the_last_binade_of_e2m1(values: list[float]) -> None:
    exponents = scale_exponents(torch.tensor(values)).tolist()
    assert all(4 <= value / 2.0**exponent < 8 for value, exponent in zip(values, exponents, strict=True))


def test_a_group_of_zeros_has_the_smallest_exponent() -> None:
    assert scale_exponents(torch.tensor([0.0, 2.0**-149])).tolist() == [-127, -127]
