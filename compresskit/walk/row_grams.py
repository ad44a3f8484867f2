"""Second moments of an input whose tokens count differently for each group of the rows that read it.

    H_k = sum over tokens of w_tk x_t x_t^T                                                                 (1)

symbol  meaning                                                                shape
x_t     the input at a token                                                   (in,)
w_tk    how much the token counts for the rows of group k, not negative        (tokens, groups)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.errors import NumericalError
from compresskit.walk.statistics import Gram


class RowWeights(NamedTuple):
    """Weights of the tokens for consecutive rows."""

    rows: int
    """Number of rows."""
    weights: Sequence[Tensor]
    """One (tokens,) float32 for each micro-batch of this rank, in order."""


class RowGrams(Gram):
    """Equation 1 for every group of the rows of the linears that share an input, as a `Gram` each.

    It is one statistic for `Block.collect`, which gives it the micro-batches in order.
    """

    def __init__(self, name: str, features: int, groups: Sequence[RowWeights], device: torch.device | str = "cpu"):
        """`name` stands in errors. `groups`: of the rows of the linears one below the other."""
        super().__init__(0, device)
        self.name, self.rows = name, [group.rows for group in groups]
        self.grams = [Gram(features, device) for _ in groups]
        self.weights: Iterator[tuple[Tensor, ...]] = zip(*(group.weights for group in groups), strict=True)

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, features).

        Raises:
            NumericalError: the weights are of other tokens.
        """
        weights = next(self.weights, ())
        if any(len(each) != len(x) for each in weights) or not weights:
            seen = len(weights[0]) if weights else 0
            raise NumericalError(f"{self.name}: gets {len(x)} tokens, and {seen} in the backward pass; pass --guide none")
        for gram, each in zip(self.grams, weights, strict=True):
            gram.add(x.float() * each.to(x.device).sqrt().unsqueeze(1))
        self.tokens += len(x)

    def share(self) -> None:
        """Make the sums those of all ranks."""
        super().share()
        for gram in self.grams:
            gram.share()

    @property
    def squares(self) -> Tensor:
        """Weighted sum of squares of every feature, (features,) float32: the mean over the rows of all groups."""
        total = sum(count * gram.squares.double() for count, gram in zip(self.rows, self.grams, strict=True))
        return (torch.as_tensor(total) / sum(self.rows)).float()

    def parts(self, rows: int) -> list[tuple[int, Gram]]:
        """(number of rows, their second moments), group after group."""
        return list(zip(self.rows, self.grams, strict=True))
