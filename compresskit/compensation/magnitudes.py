"""The statistic of ACT: how large each input is."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit import distributed


class Magnitudes:
    """Sum of the magnitudes of every feature, (features,) float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, features)."""
        self.sum += x.float().abs().sum(dim=0)
        self.tokens += x.shape[0]

    def share(self) -> None:
        """Make the sums those of all ranks."""
        self.tokens = distributed.total_of(self.tokens)
        distributed.total(self.sum)
