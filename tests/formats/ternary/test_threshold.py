"""formats/ternary/threshold.py: against a sort of the whole vector, with ties, zeros and tiny values. Oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compresskit.formats.ternary.threshold import Spread, Threshold

VALUES = arrays(
    np.float32,
    st.integers(1, 300),
    elements=st.one_of(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, -1e-45, 3e38]),
        st.floats(-2, 2, width=32),
    ),
)


def cut_in_parts(values: np.ndarray, density: float, parts: int) -> np.ndarray:
    pieces = np.array_split(values, parts)
    spread = Spread()
    for piece in pieces:
        spread.add(piece)
    threshold = Threshold(spread, density)
    for piece in pieces:
        threshold.add(piece)
    threshold.settle()
    return np.concatenate([threshold.cut(piece) for piece in pieces])


@given(VALUES, st.sampled_from([0.01, 0.05, 0.2, 0.5, 0.9, 1.0]), st.integers(1, 4))
def test_the_kept_entries_are_the_first_of_a_stable_sort_by_magnitude(values: np.ndarray, density: float, parts: int) -> None:
    order = np.argsort(-np.abs(values.astype(np.float64)), kind="stable")[: round(density * len(values))]
    expected = np.zeros(len(values), np.int8)
    expected[order] = np.sign(values[order]).astype(np.int8)
    assert np.array_equal(cut_in_parts(values, density, parts), expected)


def test_the_spread_is_that_of_the_whole_vector() -> None:
    values = np.random.default_rng(0).normal(3, 2, 10_001).astype(np.float32)
    spread = Spread()
    for piece in np.array_split(values, 7):
        spread.add(piece)
    assert np.isclose(spread.std, values.astype(np.float64).std(), rtol=1e-9)


def test_an_empty_vector_has_no_spread() -> None:
    spread = Spread()
    spread.add(np.zeros(0, np.float32))
    assert spread.std == 0
