"""exporting/gguf/blocks.py: codes in blocks, against what the gguf package makes of the bytes. Oracle."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from compresskit.exporting.gguf import blocks


@pytest.mark.parametrize("kind", blocks.STEPS)
def test_blocks_dequantise_to_scale_times_steps_over_the_whole_range(kind: str) -> None:
    generator = np.random.default_rng(0)
    lowest, highest = blocks.STEPS[kind]
    steps = generator.integers(lowest, highest + 1, (7, 96))
    steps[0, :2] = lowest, highest
    scales = generator.uniform(-2, 2, (7, 3)).astype(np.float16)
    found = dequantize(blocks.packed(kind, steps, scales), GGMLQuantizationType[kind])
    assert np.array_equal(found, steps * np.repeat(scales.astype(np.float32), 32, axis=1))


@given(arrays.arrays(np.int16, (2, 32), elements=st.integers(-16, 15)))
def test_five_bits_keep_any_steps(steps: np.ndarray) -> None:
    found = dequantize(blocks.packed("Q5_0", steps, np.ones((2, 1), np.float16)), GGMLQuantizationType.Q5_0)
    assert np.array_equal(found, steps)


@pytest.mark.parametrize(("bits", "symmetric", "kind"), [
    (2, True, "Q4_0"), (2, False, "Q4_0"), (3, True, "Q4_0"), (3, False, "Q4_0"), (4, True, "Q4_0"), (4, False, "Q5_0"),
    (5, True, "Q5_0"), (5, False, "Q8_0"), (8, True, "Q8_0"), (8, False, None),
])  # fmt: skip
def test_the_smallest_type_is_taken_that_holds_all_steps_of_a_grid(bits: int, symmetric: bool, kind: str | None) -> None:
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    steps = [code - zero for code in codes for zero in ([0] if symmetric else codes)]
    assert blocks.holding(min(steps), max(steps)) == kind


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_dense_weights_take_the_stated_bytes_and_are_read_back_closely(kind: str) -> None:
    weight = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    stored = blocks.rounded(kind, weight)
    assert stored.nbytes == blocks.stored_bytes(kind, weight.shape)
    error = blocks.relative_error(blocks.restored(kind, stored), weight)
    assert error <= {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.01}[kind]


def test_rows_that_are_no_whole_blocks_are_stored_in_half_precision() -> None:
    assert blocks.fitting("Q8_0", 96) == "Q8_0"
    assert blocks.fitting("Q8_0", 70) == "F16"
    assert blocks.fitting("BF16", 70) == "BF16"


def test_the_error_of_rounded_scales_is_that_of_the_weights() -> None:
    generator = np.random.default_rng(2)
    steps = generator.integers(-8, 8, (4, 64))
    exact = generator.uniform(1e-6, 2e-6, (4, 2)).astype(np.float32)
    halves = exact.astype(np.float16).astype(np.float32)
    weights = [steps * np.repeat(each, 32, axis=1) for each in (halves, exact)]
    assert blocks.scale_error(steps, halves, exact) == pytest.approx(blocks.relative_error(*weights), rel=1e-3)
    assert blocks.scale_error(steps, exact, exact) == 0.0
