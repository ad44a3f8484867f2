"""Bit masks of ternary vectors, as the coding of a block and for computing with several vectors.

As a coding: one mask bit per entry, then one sign bit per non-zero (1 for minus), least significant bit first. This takes
1 + k bits per entry at density k, which is the entropy at k = 0.5. For computing: two masks, plus and minus (ComPEFT, arXiv
2311.13171, section 2.3), with

    x . y     = |x+ & y+| + |x- & y-| - |x+ & y-| - |x- & y+|                                                    (1)
    ||x||^2   = |x+| + |x-|                                                                                     (2)

where |m| counts the ones of a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from compresskit.formats.ternary.golomb import Bits, Signs


class Masks(NamedTuple):
    """A ternary vector of `entries` entries as packed bits, least significant bit first."""

    plus: NDArray[np.uint8]
    minus: NDArray[np.uint8]
    entries: int


def encode(signs: Signs) -> tuple[int, bytes]:
    """Encode one block (entries,) int8 as (number of non-zeros, bytes)."""
    mask = signs.view(np.bool_)
    negative = signs[mask] < 0
    return len(negative), (np.packbits(mask, bitorder="little").tobytes() + np.packbits(negative, bitorder="little").tobytes())


def size(entries: int, count: int) -> int:
    """Size of a block in bytes."""
    return (entries + 7) // 8 + (count + 7) // 8


def decode(data: Bits, count: int, signs: Signs) -> bool:
    """Decode a block into zeroed `signs` (entries,); returns False if the bytes are not a block with this many non-zeros."""
    entries = len(signs)
    if len(data) != size(entries, count):
        return False
    mask_bytes = (entries + 7) // 8
    bits = np.unpackbits(data[:mask_bytes], bitorder="little")
    if bits[entries:].any():
        return False
    mask = bits[:entries].view(np.bool_)
    if np.count_nonzero(mask) != count:
        return False
    signs[mask] = 1 - 2 * np.unpackbits(data[mask_bytes:], count=count, bitorder="little").view(np.int8)
    return True


def masks(signs: Signs) -> Masks:
    """Build the two masks of a vector (entries,)."""
    return Masks(np.packbits(signs > 0, bitorder="little"), np.packbits(signs < 0, bitorder="little"), len(signs))


def signs_of(found: Masks) -> Signs:
    """Build the vector (entries,) int8 from two masks."""
    plus, minus = (np.unpackbits(mask, count=found.entries, bitorder="little").view(np.int8) for mask in found[:2])
    return plus - minus


def ones(mask: NDArray[np.uint8]) -> int:
    """Number of set bits in a mask."""
    return int(np.bitwise_count(mask).sum(dtype=np.int64))


def dot(first: Masks, second: Masks) -> int:
    """Equation 1."""
    same = ones(first.plus & second.plus) + ones(first.minus & second.minus)
    return same - ones(first.plus & second.minus) - ones(first.minus & second.plus)


def norm_squared(found: Masks) -> int:
    """Equation 2."""
    return ones(found.plus) + ones(found.minus)
