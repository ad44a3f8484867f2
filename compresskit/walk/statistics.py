"""Statistics over tokens. Each is a sum, so parts of a calibration set can be collected separately and added.

Inputs are (tokens, features) in any float dtype; sums are float32 or float64 as stated.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRAM_PANELS = 4
"""The symmetric Gram matrix is split into 4 x 4 panels; only the lower 10 are computed, 5/8 of the work."""


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

    def __iadd__(self, other: Moments) -> Moments:
        self.sum += other.sum
        self.squares += other.squares
        self.tokens += other.tokens
        return self


class Gram:
    """Sum of x xT over tokens, (features, features) float32, and sum of x, (features,) float32.

    Only the lower panels are summed; `matrix` fills the upper ones in place.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.lower = torch.zeros(features, features, device=device)
        self.sum = torch.zeros(features, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, features)."""
        x = x.float()
        step = math.ceil(x.shape[1] / GRAM_PANELS)
        for start in range(0, x.shape[1], step):
            rows = slice(start, start + step)
            columns = slice(0, start + step)
            self.lower[rows, columns].addmm_(x[:, rows].T, x[:, columns])
        self.sum += x.sum(dim=0)
        self.tokens += x.shape[0]

    def __iadd__(self, other: Gram) -> Gram:
        self.lower += other.lower
        self.sum += other.sum
        self.tokens += other.tokens
        return self

    @property
    def squares(self) -> Tensor:
        """Sum of squares of every feature, (features,)."""
        return self.lower.diagonal()

    def matrix(self) -> Tensor:
        """The full symmetric sum, (features, features); the panels above the diagonal are mirrored in place."""
        features = self.lower.shape[0]
        step = math.ceil(features / GRAM_PANELS)
        for start in range(step, features, step):
            rows = slice(start, start + step)
            self.lower[:start, rows] = self.lower[rows, :start].T
        return self.lower


class AngularDistance:
    """Mean over tokens of arccos(cosine(before, after)) / pi, the block influence of CFSP (arXiv 2409.13199)."""

    def __init__(self) -> None:
        self.total = 0.0
        self.tokens = 0

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add one micro-batch, before and after (..., hidden)."""
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        self.total += float((cosine.clamp(-1, 1).arccos() / math.pi).double().sum(dim=-1).sum())
        self.tokens += cosine.numel()

    def __iadd__(self, other: AngularDistance) -> AngularDistance:
        self.total += other.total
        self.tokens += other.tokens
        return self

    @property
    def mean(self) -> float:
        """Mean over all tokens, 0 to 1."""
        return self.total / max(1, self.tokens)


class Magnitudes:
    """Sum of the magnitudes of every feature, (features,) float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        self.sum = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, features)."""
        self.sum += x.float().abs().sum(dim=0)
        self.tokens += x.shape[0]

    def __iadd__(self, other: Magnitudes) -> Magnitudes:
        self.sum += other.sum
        self.tokens += other.tokens
        return self
