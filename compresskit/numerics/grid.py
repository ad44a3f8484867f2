"""The quantisation grid: convert weights to codes and back, for groups of consecutive inputs.

    Q = clamp(round(W / s) + z, lowest, highest),    W' = s * (Q - z)

symbol  meaning      shape           name here
W       weight       (out, in)       weight
s       scale        (out, groups)   grid.scale, rounded to its stored dtype before any division by it
z       zero point   (out, groups)   grid.zero_point, a whole number within the codes' range; 0 where symmetric
Q       codes        (out, in)       signed whole numbers, held as floats during computation

The range of every group contains 0, so that 0 is on the grid: pack-quantized files can hold no other zero points, and
models need it (a 16-bit float minimum instead of the whole-number zero point gave a perplexity of 194 instead of 79 at
3 bits on SmolLM2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.numerics.scales import rounded_scale
from compresskit.numerics.scheme import Scheme


class Grid(NamedTuple):
    """Scales and zero points of one linear, float32, (out, groups) each."""

    scale: Tensor
    zero_point: Tensor
    divisor: Tensor | None = None
    """What the stored scales were divided by, (1,) float32, of formats with scales in two levels."""


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """Split the inputs into groups: (out, in) -> (out, groups, group)."""
    return weight.reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def range_of(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every group, including 0: (out, in) -> two of (out, groups) float32."""
    groups = grouped(weight.float(), scheme)
    return groups.amin(dim=-1).clamp_max(0), groups.amax(dim=-1).clamp_min(0)


def grid_of_range(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """Build the grid that spans a range with low <= 0 <= high, (out, groups)."""
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = rounded_scale((high - low) / scheme.steps, scale_dtype)
    if scheme.symmetric:
        return Grid(scale, torch.zeros_like(scale))
    return Grid(scale, (scheme.lowest - low / scale).round().clamp(scheme.lowest, scheme.highest))


def min_max_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """Build the grid that spans every group's weights; weight (out, in) in any float dtype."""
    return grid_of_range(*range_of(weight, scheme), scheme, scale_dtype)


def to_codes(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """Round every weight to the nearest code: (out, in) -> whole numbers (out, in) float32."""
    position = grouped(weight.float(), scheme) / grid.scale.unsqueeze(-1)
    return scheme.nearest(position, grid.zero_point.unsqueeze(-1)).flatten(1)


def from_codes(codes: Tensor, grid: Grid, scheme: Scheme, stored: torch.dtype = torch.float32) -> Tensor:
    """Convert codes to weights, (out, in) float32, rounded like readers that multiply in the scale's `stored` dtype."""
    steps = (grouped(codes, scheme) - grid.zero_point.unsqueeze(-1)).flatten(1)
    return (grouped(steps, scheme) * grid.scale.unsqueeze(-1)).flatten(1).to(stored).float()
