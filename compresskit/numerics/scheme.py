"""How a linear is quantised: bits, group size, symmetry. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass

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


def packed_words(count: int, bits: int) -> int:
    """32-bit words that hold `count` codes without gaps."""
    return -(-count * bits // BITS_PER_WORD)
