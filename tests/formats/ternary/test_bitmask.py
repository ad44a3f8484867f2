"""formats/ternary/bitmask.py: what is decoded is what was encoded; arithmetic on masks is that on vectors. Property tests."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from compresskit.formats.ternary import bitmask

SIGNS = arrays(np.int8, st.integers(0, 8192), elements=st.sampled_from([-1, 0, 1]), fill=st.sampled_from([-1, 0, 1]))


@given(SIGNS)
def test_mask_blocks_decode_to_what_was_encoded(signs: np.ndarray) -> None:
    count, data = bitmask.encode(signs)
    assert len(data) == bitmask.size(len(signs), count)
    found = np.zeros(len(signs), np.int8)
    assert bitmask.decode(np.frombuffer(data, np.uint8), count, found)
    assert np.array_equal(found, signs)


@given(st.data())
def test_arithmetic_on_masks_is_that_on_the_vectors(data: st.DataObject) -> None:
    entries = data.draw(st.integers(1, 300))
    same_length = arrays(np.int8, entries, elements=st.sampled_from([-1, 0, 1]))
    first, second = data.draw(same_length), data.draw(same_length)
    masks = bitmask.masks(first), bitmask.masks(second)
    assert bitmask.dot(*masks) == int(first.astype(int) @ second.astype(int))
    assert bitmask.norm_squared(masks[0]) == int(np.abs(first).sum())
    assert np.array_equal(bitmask.signs_of(masks[0]), first)
