"""formats/archive/sections.py: each kind comes back, codes gain by their zero points, and an entry that cannot be is refused."""

from __future__ import annotations

import zlib
from dataclasses import replace

import numpy as np
import pytest
from archive_files import low_bit_tensors

from compresskit.errors import CheckpointError
from compresskit.formats.archive.sections import Section, decode, encode, fault

RANDOM = np.random.default_rng(0)


def codes_section(bits: int, rows: int = 96, shuffled: bool = False) -> tuple[Section, np.ndarray]:
    tensors = low_bit_tensors(bits, rows)
    codes, points = (tensors[name].numpy() for name in ("a.weight_packed", "a.weight_zero_point"))
    if shuffled:
        points = RANDOM.permutation(points.reshape(-1)).reshape(points.shape)
    data = np.frombuffer(codes.tobytes() + points.tobytes(), np.uint8)
    places = ((100, codes.nbytes), (50_000_000, points.nbytes))
    return Section(0, "codes", (bits, 4, codes.shape[1]), "codes", places), data


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_codes_come_back_and_are_smaller_in_the_order_of_their_zero_points(bits: int) -> None:
    section, data = codes_section(bits, rows=2048)
    assert fault(section) == ""
    found, stored = encode(section, data, 0)
    assert decode(found, stored).tobytes() == data.tobytes()
    plain = encode(replace(section, kind="planes", parameters=(1, 0)), data, 0)[0].stored
    assert found.kind == ("codes" if bits > 1 else found.kind)
    assert found.stored < (0.99 if bits > 1 else 1.001) * plain


def test_codes_whose_zero_points_say_nothing_are_stored_plain() -> None:
    section = codes_section(2)[0]
    data = RANDOM.integers(0, 256, section.bytes).astype(np.uint8)
    found, stored = encode(section, data, 0)
    assert found.kind == "planes"
    assert decode(found, stored).tobytes() == data.tobytes()


@pytest.mark.parametrize(("kind", "parameters", "size"), [("bytes", (), 5), ("planes", (2, 1), 4000), ("planes", (8, 0), 80)])
def test_other_kinds_come_back(kind: str, parameters: tuple[int, ...], size: int) -> None:
    data = RANDOM.normal(0, 1, size).astype(np.float16).view(np.uint8)[:size].copy()
    section = Section(0, kind, parameters, "x", ((0, size),))
    assert fault(section) == ""
    found, stored = encode(section, data, size)
    assert decode(found, stored).tobytes() == data.tobytes()
    with pytest.raises(CheckpointError, match="checksum"):
        decode(found, stored[:-1])
    with pytest.raises(CheckpointError, match="checksum"):
        decode(found, bytes([*stored[:-1], stored[-1] ^ 1]))


@pytest.mark.parametrize("changed", [
    {"kind": "planes", "parameters": (7, 0)}, {"kind": "bytes"}, {"kind": "none"}, {"parameters": (2, 4)},
    {"parameters": (5, 4, 16)}, {"parameters": (2, 0, 16)}, {"parameters": (2, 4, 7)},
    {"places": ((100, 6144),)}, {"places": ((0, 6144), (0, 4))},
    {"places": ((0, 0), (0, 0))},
    {"kind": "planes", "parameters": (1, 1)}, {"kind": "planes", "parameters": (2, 2)}, {"places": ((0, 1 << 25), (0, 96))},
])  # fmt: skip
def test_an_entry_that_cannot_be_is_refused(changed: dict[str, object]) -> None:
    section = codes_section(2)[0]
    assert fault(section) == ""
    assert fault(replace(section, **changed)) != ""  # type: ignore[arg-type]


def test_stored_bytes_that_contradict_the_entry_are_refused() -> None:
    """With a right checksum, as a forger would make them."""
    section, data = codes_section(2)
    found, stored = encode(section, data, 0)
    other, _ = codes_section(2, rows=64)
    for entry, body in ((replace(other, stored=len(stored)), stored), (replace(section, kind="bytes", parameters=()), stored)):
        with pytest.raises(CheckpointError):
            decode(replace(entry, stored=len(body), crc=zlib.crc32(body)), body)
    swapped = bytearray(stored)
    swapped[2:11], swapped[11:20] = stored[11:20], stored[2:11]
    for body in (bytes(swapped), b"\0\0", b"", bytes(2) + stored[2:]):
        with pytest.raises(CheckpointError):
            decode(replace(found, stored=len(body), crc=zlib.crc32(body)), body)
