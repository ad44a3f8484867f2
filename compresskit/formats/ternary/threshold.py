"""Find the magnitude threshold of a vector's top k entries, and its spread, from a stream of parts without storing them.

Non-negative floats sort like their bit patterns. A count by the upper 16 bits finds the threshold's bin, and a count of
that bin by the lower 16 bits finds it exactly:

    pass 1: Spread.add(part)        counts by the upper 16 bits, and the moments
    pass 2: Threshold.add(part)     counts by the lower 16 bits within the bin

    std(tau)**2 = mean(tau**2) - mean(tau)**2        over all entries, in float64, divided by their number          (1)

ComPEFT, arXiv 2311.13171, section 2.1, algorithm 1, sorts the whole vector instead and finds the same threshold. Of the
entries exactly at the threshold, the first ones are kept until there are k; zeros are never kept.
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
"""Entries counted at once; temporaries stay below 16 MB."""
Values = NDArray[np.float32]


def magnitude_bits(values: Values) -> NDArray[np.uint32]:
    """Bits of |x|, which sort like |x|: (entries,) -> (entries,)."""
    return values.view(np.uint32) & np.uint32(0x7FFFFFFF)


class Spread:
    """Pass 1: number of entries, moments, and counts by the upper half of the magnitude bits."""

    def __init__(self) -> None:
        self.entries = 0
        self.sum = 0.0
        self.squares = 0.0
        self.counts = np.zeros(HALVES // 2, np.int64)

    def add(self, values: Values) -> None:
        """Count a part (entries,) of finite float32."""
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
    """Pass 2, then the cut: call `cut(part)` once for every part, in the same order."""

    def __init__(self, spread: Spread, density: float) -> None:
        """`density` is the share of entries to keep."""
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
        """Compute the threshold from the counts; `cut` may be called afterwards."""
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
        """Return a settled threshold for another pass from the start."""
        return copy.copy(self)

    def cut(self, values: Values) -> Signs:
        """Return the signs (entries,) int8 of a part's kept entries, 0 elsewhere."""
        bits = magnitude_bits(values)
        kept = bits > self.bits
        if self.ties:
            equal = np.flatnonzero(bits == self.bits)[: self.ties]
            kept[equal] = True
            self.ties -= len(equal)
        signs = kept.view(np.int8)
        np.multiply(signs, -1, out=signs, where=(values < 0))
        return signs
