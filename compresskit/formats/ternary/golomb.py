"""Golomb-Rice coding of one block of a ternary vector: the gaps between its non-zeros, and their signs.

Golomb, IEEE Trans. Inf. Theory 12 (1966); the parameter follows ComPEFT, arXiv 2311.13171, section 2.3.

    gap_i = position_i - position_(i-1) - 1                   quotient = gap >> b, remainder = gap mod 2**b     (1)
    b*    = 1 + floor(log2(log(phi - 1) / log(1 - k)))        at least 0                                         (2)
    bits per entry = k (b + 1 / (1 - (1 - k)**(2**b)) + 1)    expected, gap and sign                             (3)

symbol  meaning                       shape        name here
k       share of non-zeros            ()           density
b       Rice parameter                ()           rice
phi     golden ratio                  ()           GOLDEN_RATIO
        a block of the vector         (entries,)   signs, int8

A block's bits, least significant first: the signs (1 for minus), the remainders bit plane by bit plane, and the
quotients in unary, each as zeros followed by a one. Bit planes let both directions work on whole arrays. The numbers of
non-zeros and bytes are stored outside the block.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

GOLDEN_RATIO = (1 + math.sqrt(5)) / 2
LARGEST_RICE = 13
"""A block has 2**13 entries: no gap needs more bits."""
Signs = NDArray[np.int8]
Bits = NDArray[np.uint8]


def rice_parameter(density: float) -> int:
    """Equation 2, limited to 0 to 13."""
    if density <= 0:
        return LARGEST_RICE
    if density >= 1:
        return 0
    best = 1 + math.floor(math.log2(math.log(GOLDEN_RATIO - 1) / math.log1p(-density)))
    return min(max(best, 0), LARGEST_RICE)


def entropy(density: float) -> float:
    """Entropy in bits per entry: the lower bound for coding independent entries with equally likely signs."""
    if density in (0, 1):
        return density
    return -(1 - density) * math.log2(1 - density) - density * math.log2(density / 2)


def encode(signs: Signs, rice: int) -> tuple[int, bytes]:
    """Encode one block (entries,) int8 as (number of non-zeros, bytes)."""
    positions = signs.view(np.bool_).nonzero()[0].astype(np.int16)
    count = len(positions)
    if count == 0:
        return 0, b""
    gaps = np.empty(count, np.int16)
    gaps[0] = positions[0]
    np.subtract(positions[1:], positions[:-1], out=gaps[1:])
    gaps[1:] -= 1
    ends = ((gaps >> rice) + np.int16(1)).cumsum(dtype=np.int32)
    start = count * (rice + 1)
    bits = np.zeros(start + int(ends[-1]), np.uint8)
    bits[:count] = signs[positions] < 0
    for plane in range(rice):
        bits[count * (plane + 1) : count * (plane + 2)] = (gaps >> plane) & 1
    ends += start - 1
    bits[ends] = 1
    return count, np.packbits(bits, bitorder="little").tobytes()


def decode(data: Bits, count: int, rice: int, signs: Signs) -> bool:
    """Decode a block into zeroed `signs` (entries,); returns False if the bytes are not a block with this many non-zeros."""
    if count == 0:
        return len(data) == 0
    bits = np.unpackbits(data, bitorder="little")
    start = count * (rice + 1)
    ends = bits[start:].view(np.bool_).nonzero()[0]
    if len(ends) != count or (start + int(ends[-1])) // 8 + 1 != len(data):
        return False
    if int(ends[-1]) + 1 - count > len(signs) >> rice:  # more than all gaps together; may overflow below
        return False
    steps = np.empty(count, np.int32)
    steps[0] = ends[0] + 1
    np.subtract(ends[1:], ends[:-1], out=steps[1:], casting="unsafe")
    steps -= 1
    steps <<= rice
    for plane in range(rice):
        steps += bits[count * (plane + 1) : count * (plane + 2)].astype(np.int32) << plane
    steps += 1
    positions = steps.cumsum(dtype=np.int64)
    if positions[-1] > len(signs):
        return False
    positions -= 1
    signs[positions] = 1 - 2 * bits[:count].view(np.int8)
    return True
