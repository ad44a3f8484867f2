"""Quantisation scheme of a linear: bits, group size, symmetry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BITS_PER_WORD = 32


@dataclass(frozen=True)
class Scheme:
    """An affine grid for groups of consecutive inputs: W ~= scale * (code - zero_point), with signed codes of `bits` bits."""

    bits: int
    group_size: int
    """Inputs per scale; 0 for a whole row."""
    symmetric: bool
    """Whether the zero point is always 0 and not stored."""

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    @property
    def steps(self) -> int:
        """Number of steps between the smallest and the largest code."""
        return (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Number of groups in a row of this many inputs."""
        return columns // self.group_size if self.group_size else 1

    def fits(self, columns: int) -> bool:
        """Whether rows of this many inputs divide into whole groups."""
        return not self.group_size or columns % self.group_size == 0

    def nearest(self, position: Tensor, zero_point: Tensor) -> Tensor:
        """Codes next to positions W / s on the grid, any shapes that fit each other; `position` is overwritten."""
        return (position.round_() + zero_point).clamp_(self.lowest, self.highest)


def packed_words(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` codes without gaps."""
    return -(-count * bits // BITS_PER_WORD)
