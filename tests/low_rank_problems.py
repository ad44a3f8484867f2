"""Small problems of low-rank repair: residuals, and inputs whose moments are the measure."""

from __future__ import annotations

import torch

from compresskit.numerics.lowrank import Metric

SHAPES = [(7, 12), (12, 12), (20, 12)]


def problem(tokens: int, rows: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(12, 12, generator=generator, dtype=torch.float64)
    return torch.randn(rows, 12, generator=generator, dtype=torch.float64), x


def moments(x: torch.Tensor) -> Metric:
    return Metric(x.T @ x / len(x))
