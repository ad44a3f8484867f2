"""The magnitude that the top k of a vector reach, and its spread, from a stream of its parts; nothing is kept of them.

Non-negative floats are ordered as their bits are, so a count by the upper half of the bits finds the bin of the
threshold, and a count of that bin's lower halves finds it exactly:

    pass 1: Spread.add(part)        counts by the upper 16 bits, and the moments
    pass 2: Threshold.add(part)     counts by the lower 16 bits, where the upper ones are the bin's

    std(tau)**2 = mean(tau**2) - mean(tau)**2        over all entries, in float64, divided by their number          (1)

ComPEFT, arXiv 2311.13171, section 2.1, algorithm 1, which sorts the whole vector instead. The threshold is that of the
sort. Of entries exactly at it, the first ones are kept, until there are k; zeros are never kept.
"""

from __future__ import annotations

import copy
import math

import numpy as np
from numpy.typing import NDArray

from compresskit.formats.ternary.golomb import Signs

HALF = 16
HALVES = 1 << HALF
CHUNK = 1 << 20
"""Entries that are counted at once: temporaries stay below 16 MB."""
Values = NDArray[np.float32]


def magnitude_bits(values: Values) -> NDArray[np.uint32]:
    """The bits of |x|, in the order of |x|: (entries,) -> (entries,)."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


class Spread:
    """Pass 1: number, moments, and the count by the upper half of the magnitudes' bits."""

    def __init__(self) -> None:
        self.entries = 0
        self.sum = 0.0
        self.squares = 0.0
        self.counts = np.zeros(HALVES // 2, np.int64)

    def add(self, values: Values) -> None:
        """Count a part (entries,) float32; finite."""
        for start in range(0, len(values), CHUNK):
            part = values[start : start + CHUNK]
            exact = part.astype(np.float64)
            self.sum += float(exact.sum())
            self.squares += float(np.dot(exact, exact))
            self.counts += np.bincount(magnitude_bits(part) >> HALF, minlength=HALVES // 2)
        self.entries += len(values)

    @property
    def std(self) -> float:
        """Equation 1; 0 for an empty vector."""
        if not self.entries:
            return 0.0
        return math.sqrt(max(0.0, self.squares / self.entries - (self.sum / self.entries) ** 2))


class Threshold:
    """Pass 2, then the cut: `cut(part)`, once for every part in the same order."""

    def __init__(self, spread: Spread, density: float) -> None:
        """`density`: the share to keep."""
        self.wanted = round(density * spread.entries)
        above = np.cumsum(spread.counts[::-1])
        place = int(np.searchsorted(above, self.wanted)) if self.wanted else 0
        self.bin = len(spread.counts) - 1 - place
        self.in_bin = self.wanted - (int(above[place]) - int(spread.counts[self.bin])) if self.wanted else 0
        self.counts = np.zeros(HALVES, np.int64)
        self.bits = -1
        self.ties = 0

    def add(self, values: Values) -> None:
        """Count a part (entries,) float32."""
        for start in range(0, len(values), CHUNK):
            bits = magnitude_bits(values[start : start + CHUNK])
            lower = bits[(bits >> HALF) == self.bin] & np.uint32(HALVES - 1)
            self.counts += np.bincount(lower, minlength=HALVES)

    def settle(self) -> None:
        """Find the threshold from the counts; afterwards `cut` may be called."""
        if not self.wanted:
            self.bits = 1 << 31
            return
        above = np.cumsum(self.counts[::-1])
        place = int(np.searchsorted(above, self.in_bin))
        lower = HALVES - 1 - place
        self.bits = (self.bin << HALF) | lower
        self.ties = self.in_bin - (int(above[place]) - int(self.counts[lower]))
        if self.bits == 0:
            self.ties = 0

    def again(self) -> Threshold:
        """A settled threshold for another pass from the start."""
        return copy.copy(self)

    def cut(self, values: Values) -> Signs:
        """Signs (entries,) int8 of the kept entries of a part, 0 elsewhere."""
        bits = magnitude_bits(values)
        kept = bits > self.bits
        if self.ties:
            equal = np.flatnonzero(bits == self.bits)[: self.ties]
            kept[equal] = True
            self.ties -= len(equal)
        signs = kept.view(np.int8)
        np.multiply(signs, -1, out=signs, where=(values < 0))
        return signs
