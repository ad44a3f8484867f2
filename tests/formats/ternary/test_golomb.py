"""formats/ternary/golomb.py: what is decoded is what was encoded (property); bits and sizes are as defined (oracle)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ternary_files import random_signs

from compresskit.formats.ternary import golomb

SIGNS = arrays(np.int8, st.integers(0, 8192), elements=st.sampled_from([-1, 0, 1]), fill=st.sampled_from([-1, 0, 1]))


def written_out(signs: np.ndarray, rice: int) -> str:
    """The bits of a Golomb-Rice block by the definition, a character at a time."""
    positions = [i for i, sign in enumerate(signs) if sign]
    gaps = [b - a - 1 for a, b in zip([-1, *positions[:-1]], positions, strict=True)] if positions else []
    planes = "".join(str(gap >> plane & 1) for plane in range(rice) for gap in gaps)
    return "".join("1" if signs[i] < 0 else "0" for i in positions) + planes + "".join("0" * (g >> rice) + "1" for g in gaps)


@given(SIGNS, st.integers(0, 13))
def test_golomb_blocks_decode_to_what_was_encoded(signs: np.ndarray, rice: int) -> None:
    count, data = golomb.encode(signs, rice)
    found = np.zeros(len(signs), np.int8)
    assert golomb.decode(np.frombuffer(data, np.uint8), count, rice, found)
    assert np.array_equal(found, signs)


@given(arrays(np.int8, st.integers(0, 200), elements=st.sampled_from([-1, 0, 0, 0, 1])), st.integers(0, 5))
def test_golomb_bits_are_those_of_the_definition(signs: np.ndarray, rice: int) -> None:
    _, data = golomb.encode(signs, rice)
    text = written_out(signs, rice)
    bits = "".join(map(str, np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")))
    assert bits == text + "0" * (-len(text) % 8)


@pytest.mark.parametrize("density", [0.001, 0.01, 0.05, 0.1, 0.2, 0.3])
def test_golomb_blocks_are_as_long_as_the_paper_expects(density: float) -> None:
    rice = golomb.rice_parameter(density)
    blocks = [golomb.encode(random_signs(8192, density, seed), rice) for seed in range(64)]
    bits = 8 * sum(len(data) for _, data in blocks) / (64 * 8192)
    expected = density * (rice + 1 / (1 - (1 - density) ** (1 << rice)) + 1)
    assert math.isclose(bits, expected, rel_tol=0.08 if density < 0.01 else 0.03)
    assert bits < 1.05 * golomb.entropy(density) + 4 / 8192


def test_forged_blocks_are_told_apart() -> None:
    count, data = golomb.encode(random_signs(8192, 0.1), 3)
    block = np.frombuffer(data, np.uint8)
    for wrong in (count - 1, count + 1, 0):
        assert not golomb.decode(block, wrong, 3, np.zeros(8192, np.int8))
    assert not golomb.decode(block, count, 3, np.zeros(4096, np.int8))
    assert not golomb.decode(block[:-1], count, 3, np.zeros(8192, np.int8))
