"""formats/archive/planes.py: turned whole numbers, the toolkit's unpacking, a sort in Python. Oracle and property."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.formats.archive.planes import by_zero_point, from_zero_points, joined, planes, zero_points_of
from compresskit.numerics.bit_packing import packed, unpacked


@given(st.sampled_from([1, 2, 4, 8]), st.booleans(), st.integers(1, 50), st.integers(0, 1 << 30))
def test_planes_are_the_bytes_of_whole_numbers_turned_left_by_a_bit(width: int, turned: bool, count: int, seed: int) -> None:
    turned = turned and width > 1
    data = np.frombuffer(np.random.default_rng(seed).bytes(width * count), np.uint8)
    found = planes(data, width, turned)
    bits = 8 * width
    for place in range(count):
        number = int.from_bytes(data[place * width : (place + 1) * width].tobytes(), "little")
        if turned:
            number = (number << 1 | number >> (bits - 1)) % (1 << bits)
        assert [int(plane[place]) for plane in found] == list(number.to_bytes(width, "big"))
    assert joined(found, turned).tobytes() == data.tobytes()


def test_the_first_plane_of_bfloat16_is_its_exponent() -> None:
    values = torch.randn(1000).to(torch.bfloat16)
    exponents = torch.frexp(values.float())[1] + 126
    assert planes(values.view(torch.uint8).numpy(), 2, True)[0].tolist() == exponents.tolist()


@given(st.integers(1, 4), st.integers(1, 70), st.integers(1, 5), st.integers(0, 1 << 30))
def test_zero_points_are_those_that_readers_unpack(bits: int, rows: int, groups: int, seed: int) -> None:
    points = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, groups), generator=torch.Generator().manual_seed(seed))
    words = packed(points.T.contiguous(), bits).T.contiguous()
    read = unpacked(words.T, bits, rows).T + (1 << (bits - 1))
    found = zero_points_of(np.frombuffer(words.numpy().tobytes(), np.uint8), bits, rows, groups)
    assert found.reshape(rows, groups).tolist() == read.tolist()


@given(st.integers(1, 4), st.integers(1, 40), st.sampled_from([3, 6, 12, 24]), st.integers(0, 1 << 30))
def test_groups_lie_in_the_order_of_their_zero_points_and_come_back(bits: int, count: int, group: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    data, points = (
        generator.integers(0, 256, count * group).astype(np.uint8),
        generator.integers(0, 1 << bits, count).astype(np.uint8),
    )
    runs = by_zero_point(data, points, bits)
    step = 3 if bits == 3 else 1
    for number in range(1 << bits):
        kept = [data[i * group : (i + 1) * group].tolist() for i in range(count) if points[i] == number]
        flat = [each for one in kept for each in one]
        assert [run.tolist() for run in runs[number * step : (number + 1) * step]] == [flat[phase::step] for phase in range(step)]
    out = np.empty_like(data)
    from_zero_points(runs, points, bits, out)
    assert out.tolist() == data.tolist()


def test_runs_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        from_zero_points(
            [np.zeros(8, np.uint8), np.zeros(8, np.uint8)], np.array([0, 0, 0, 1], np.uint8), 1, np.empty(16, np.uint8)
        )
