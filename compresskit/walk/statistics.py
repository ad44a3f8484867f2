"""Statistics over tokens. Each is a sum, so parts of a calibration set can be collected separately and added.

Inputs are (tokens, features) in any float dtype. A micro-batch is summed in float32, micro-batches are added in float64: that
is exact but for entries whose sums span more than 2^25, so that neither their order nor the number of ranks matters.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compresskit import distributed

FEWEST_PANELS, WIDEST_PANEL = 4, 512
"""The symmetric Gram matrix is split into panels of at most 512 features, and only the lower ones are computed: of 4 x 4
panels 10, 5/8 of the work, of the 16 x 16 of 8,192 features 17/32."""


class Moments:
    """Sum and sum of squares of every feature, (features,) float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.squares = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, features)."""
        x = x.float()
        self.sum += x.sum(dim=0)
        self.squares += x.square().sum(dim=0)
        self.tokens += x.shape[0]

    def share(self) -> None:
        """Make the sums those of all ranks."""
        self.tokens = distributed.total_of(self.tokens)
        for each in (self.sum, self.squares):
            distributed.total(each)


class Gram:
    """Sum of x xT over tokens, (features, features), and sum of x, (features,), both float64.

    Only the lower panels are summed; `matrix` gives all.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.lower = torch.zeros(features, features, dtype=torch.float64, device=device)
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, features)."""
        x = x.float()
        for rows, columns in self._panels():
            self.lower[rows, columns] += x[:, rows].T @ x[:, columns]
        self.sum += x.sum(dim=0)
        self.tokens += x.shape[0]

    def share(self) -> None:
        """Make the sums those of all ranks."""
        self.tokens = distributed.total_of(self.tokens)
        distributed.total(self.sum)
        for rows, columns in self._panels():
            panel = self.lower[rows, columns].contiguous()
            self.lower[rows, columns] = distributed.total(panel)

    def _panels(self) -> list[tuple[slice, slice]]:
        features = self.lower.shape[0]
        step = min(WIDEST_PANEL, max(1, math.ceil(features / FEWEST_PANELS)))
        return [(slice(start, start + step), slice(0, start + step)) for start in range(0, features, step)]

    @property
    def squares(self) -> Tensor:
        """Sum of squares of every feature, (features,) float32."""
        return self.lower.diagonal().float()

    def matrix(self) -> Tensor:
        """The full symmetric sum, (features, features) float32; nothing is added any more, and the sums in float64 are freed."""
        if self.lower.dtype == torch.float64:
            self.lower = self.lower.float()
            for rows, _ in self._panels():
                self.lower[: rows.start, rows] = self.lower[rows, : rows.start].T
        return self.lower

    def parts(self, rows: int) -> list[tuple[int, Gram]]:
        """(number of rows, their second moments) of a weight with so many rows; these have one for all."""
        return [(rows, self)]
