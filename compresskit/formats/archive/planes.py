"""The bytes of tensors in an order whose runs have a low entropy, and back. numpy only.

    r_k = (b_k << 1) | (b_(k-1) >> 7),    k = 0 ... w-1, indices modulo w                                              (1)

turns a float's w bytes b, little-endian, left by one bit: the sign goes to the end, and bfloat16's exponent fills byte w-1,
whose entropy is a third of its size in trained weights. Byte k of all elements is plane k.

A group of codes that shares a scale was rounded from its smallest weight, so its zero point z says how far its codes lie to
either side of zero:

    H(codes | z) < H(codes)                                                                                            (2)

The groups are put in the order of their zero points, and each z makes runs of its own.

symbol  meaning                            shape                       name here
b, r    bytes of the elements              (elements, w) uint8         data, planes
z       zero points of the groups          (rows * groups,) uint8      zero_points
        the codes of a group               (group_bytes,) uint8        a row of `groups`
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
BITS_PER_BYTE = 8
BITS_PER_WORD = 32


def planes(data: Bytes, width: int, turned: bool) -> list[Bytes]:
    """The planes of elements (elements * width,), (elements,) each, the last byte first; `turned`: by equation 1."""
    if not turned:
        return [np.ascontiguousarray(data[place::width]) for place in reversed(range(width))]
    numbers = data.view(f"<u{width}")
    numbers = (numbers << 1) | (numbers >> (BITS_PER_BYTE * width - 1))
    return [(numbers >> (BITS_PER_BYTE * place)).astype(np.uint8) for place in reversed(range(width))]


def joined(parts: list[Bytes], turned: bool) -> Bytes:
    """The inverse of `planes`: parts (elements,) each -> (elements * len(parts),)."""
    width = len(parts)
    if not turned:
        data = np.empty((len(parts[0]), width), np.uint8)
        for place, part in enumerate(reversed(parts)):
            data[:, place] = part
        return data.reshape(-1)
    numbers = parts[0].astype(f"<u{width}")  # whole numbers: four times as fast as bytes that lie apart
    for part in parts[1:]:
        numbers <<= 8
        numbers |= part
    last = numbers << (BITS_PER_BYTE * width - 1)
    numbers >>= 1
    numbers |= last
    return numbers.view(np.uint8)


def zero_points_of(words: Bytes, bits: int, rows: int, groups: int) -> Bytes:
    """Unpack zero points: words (ceil(rows * bits / 32), groups, 4) flat, whose last axis is a little-endian word.

    Returns:
        (rows * groups,). A column's words hold its rows' numbers of `bits` bits without gaps, least significant first.
    """
    columns = np.ascontiguousarray(words.reshape(-1, groups, 4).transpose(0, 2, 1)).reshape(-1, groups)
    if BITS_PER_BYTE % bits == 0:
        each = BITS_PER_BYTE // bits
        numbers = np.empty((len(columns), each, groups), np.uint8)
        for place in range(each):
            numbers[:, place] = (columns >> (place * bits)) & ((1 << bits) - 1)
        return numbers.reshape(-1)[: rows * groups]
    single = np.unpackbits(columns, axis=0, bitorder="little")[: rows * bits].reshape(rows, bits, groups)
    return np.packbits(single, axis=1, bitorder="little").reshape(-1)


def by_zero_point(data: Bytes, zero_points: Bytes, bits: int) -> list[Bytes]:
    """The runs of groups (len(zero_points) * group_bytes,), for each zero point 0 to 2^bits - 1 `period(bits)` runs."""
    groups = _as_rows(data, len(zero_points))
    ordered = groups.take(zero_points.argsort(kind="stable"), axis=0).view(np.uint8)
    ends = np.bincount(zero_points, minlength=1 << bits).cumsum()
    step = period(bits)
    runs = []
    for start, end in zip((0, *ends[:-1].tolist()), ends.tolist(), strict=True):
        flat = ordered[start:end].reshape(-1)
        runs += [np.ascontiguousarray(flat[phase::step]) for phase in range(step)]
    return runs


def from_zero_points(runs: list[Bytes], zero_points: Bytes, bits: int, out: Bytes) -> None:
    """The inverse of `by_zero_point`, into `out` (len(zero_points) * group_bytes,).

    Raises:
        ValueError: the runs are not as long as the zero points say.
    """
    group_bytes = len(out) // len(zero_points)
    counts = np.bincount(zero_points, minlength=1 << bits)
    step = period(bits)
    if [len(run) for run in runs] != [count * group_bytes // step for count in counts.tolist() for _ in range(step)]:
        raise ValueError("the runs do not fit the zero points")
    flat = np.empty(len(out), np.uint8)
    start = 0
    for number in range(1 << bits):
        end = start + int(counts[number]) * group_bytes
        for phase in range(step):
            flat[start + phase : end : step] = runs[number * step + phase]
        start = end
    _as_rows(out, len(zero_points))[zero_points.argsort(kind="stable")] = _as_rows(flat, len(zero_points))


def period(bits: int) -> int:
    """After how many bytes codes of `bits` bits begin on a byte again."""
    return bits // math.gcd(bits, BITS_PER_BYTE)


def _as_rows(data: Bytes, rows: int) -> NDArray[np.generic]:
    """(rows * n,) uint8 -> (rows, n / width) of the widest whole numbers: moving 8 bytes at once is faster."""
    row_bytes = len(data) // rows
    width = next(each for each in (8, 4, 2, 1) if row_bytes % each == 0)
    return data.view(f"u{width}").reshape(rows, -1)
