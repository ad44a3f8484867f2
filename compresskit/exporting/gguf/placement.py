"""Where a weight of a checkpoint goes in a GGUF file, and how its rows and columns change on the way.

llama.cpp rotates neighbouring channels of queries and keys in some architectures, where transformers rotates channel i of a
head together with channel i + d/2:

    row 2i + h of a head = row i + h d/2 of transformers,     h in {0, 1},  0 <= i < d/2               (1)

Architectures with one width for all blocks get rows and columns of zeros up to the widest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Placement:
    """How a linear's weight (out, in), its bias and its factors change."""

    name: str
    """Name in the file, without `.weight`."""
    heads: int = 0
    """Heads whose rows are reordered by equation 1; 0 for none."""
    fused: int = 1
    """Equal parts of the rows; each is padded by itself."""
    rows: int = 0
    """Rows of each part after padding; 0 for as many as there are."""
    columns: int = 0
    """Columns after padding; 0 for as many as there are."""

    def shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """(out, in) in the file."""
        return (self.fused * self.rows or shape[0], self.columns or shape[1])

    def place_rows(self, values: NDArray[T]) -> NDArray[T]:
        """Reorder and pad the first axis, of outputs."""
        if self.heads:
            values = values[paired_rows(len(values), self.heads)]
        if self.fused * self.rows > len(values):
            parts = values.reshape(self.fused, -1, *values.shape[1:])
            missing = self.rows - parts.shape[1]
            padding = [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 1)]
            values = np.pad(parts, padding).reshape(-1, *values.shape[1:])
        return values

    def place_columns(self, values: NDArray[T], per_column: int = 1) -> NDArray[T]:
        """Pad the last axis, of inputs, or of groups of `per_column` inputs."""
        missing = (self.columns // per_column - values.shape[-1]) if self.columns else 0
        return np.pad(values, [*[(0, 0)] * (values.ndim - 1), (0, missing)]) if missing > 0 else values


def paired_rows(rows: int, heads: int) -> NDArray[np.int64]:
    """Equation 1: the row of transformers that becomes each row of the file."""
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
