"""exporting/gguf/placement.py: the order of rotated rows from the rotations themselves, padding. Oracle."""

from __future__ import annotations

import numpy as np
import pytest

from compresskit.exporting.gguf.placement import Placement, paired_rows


def halves_rotated(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """As transformers rotates a head (d,): channel i with channel i + d/2."""
    first, second = np.split(vector, 2)
    return np.concatenate([first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)])


def neighbours_rotated(vector: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """As llama.cpp does: channel 2i with channel 2i + 1, as one complex number."""
    turned = (vector[0::2] + 1j * vector[1::2]) * np.exp(1j * angles)
    return np.stack([turned.real, turned.imag], axis=1).ravel()


def test_scores_of_neighbours_rotated_after_reordering_are_those_of_transformers() -> None:
    generator, heads, width = np.random.default_rng(0), 3, 8
    queries, keys = generator.normal(size=(2, heads * width))
    rows = paired_rows(heads * width, heads)
    frequencies = 10000.0 ** -(np.arange(0, width, 2) / width)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        for position in (1, 7, 100):
            wanted = halves_rotated(queries[part], position * frequencies) @ halves_rotated(keys[part], 3 * frequencies)
            found = neighbours_rotated(queries[rows][part], position * frequencies) @ neighbours_rotated(
                keys[rows][part], 3 * frequencies
            )
            assert found == pytest.approx(wanted)


def test_each_fused_part_is_padded_by_itself() -> None:
    place = Placement("blk.0.ffn_up", fused=2, rows=4)
    weight = np.arange(12).reshape(6, 2)
    found = place.place_rows(weight)
    assert found.tolist() == [*weight[:3].tolist(), [0, 0], *weight[3:].tolist(), [0, 0]]
    assert place.shape((6, 2)) == found.shape
    assert place.place_rows(np.arange(6)).tolist() == [0, 1, 2, 0, 3, 4, 5, 0]


def test_columns_and_their_groups_are_padded_at_the_end() -> None:
    place = Placement("blk.0.ffn_down", columns=96)
    assert place.place_columns(np.ones((2, 64))).sum(axis=0).tolist() == [2] * 64 + [0] * 32
    assert place.place_columns(np.ones((2, 2)), 32).tolist() == [[1, 1, 0]] * 2
    assert place.shape((2, 64)) == (2, 96)


def test_without_a_change_nothing_is_changed() -> None:
    values = np.ones((4, 4))
    place = Placement("output")
    assert place.place_rows(values) is values
    assert place.place_columns(values) is values
    assert place.shape((4, 4)) == (4, 4)
