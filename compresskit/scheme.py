"""How a linear is quantised: bits, group size, symmetry, and what that costs on disk. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

SCALE_BITS = 16
BITS_PER_WORD = 32


@dataclass(frozen=True)
class Scheme:
    """An affine grid for groups of consecutive inputs: W ~= scale * (code - zero_point), signed codes of `bits` bits."""

    bits: int
    group_size: int
    """Inputs that share a scale; 0 for a whole row."""
    symmetric: bool
    """Whether the zero point is 0 everywhere and not stored."""

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
        """Steps between the smallest and the largest code."""
        return (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Groups in a row of this many inputs."""
        return columns // self.group_size if self.group_size else 1

    def fits(self, columns: int) -> bool:
        """Whether rows of this many inputs divide into whole groups."""
        return not self.group_size or columns % self.group_size == 0

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits of one linear in the files: codes, 16-bit scales, zero points at code width; words of 32 bits are full."""
        codes = rows * packed_words(columns, self.bits)
        zero_points = 0 if self.symmetric else packed_words(rows, self.bits) * self.groups(columns)
        return BITS_PER_WORD * (codes + zero_points) + SCALE_BITS * rows * self.groups(columns)


def packed_words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes without gaps."""
    return -(-count * bits // BITS_PER_WORD)
