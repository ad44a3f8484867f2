"""The quantisation grid: from weights to codes and back, for groups of consecutive inputs.

    Q = clamp(round(W / s) + z, lowest, highest),    W' = s * (Q - z)

symbol  meaning      shape           name here
W       weight       (out, in)       weight
s       scale        (out, groups)   grid.scale, rounded to its stored dtype before anything is divided by it
z       zero point   (out, groups)   grid.zero_point, a whole number within the codes' range; 0 where symmetric
Q       codes        (out, in)       signed whole numbers, kept as floats while they are worked on

The range of every group contains 0, so that 0 is on the grid: pack-quantized files cannot hold another zero point, and
models need it (a 16-bit float minimum in place of the whole-number zero point measured 194 against 79 in perplexity at
3 bits on SmolLM2).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.numerics.scheme import Scheme

SEARCH_STEPS = 32
"""Ranges tried by the error search: full, then narrower by equal steps down to `NARROWEST`."""
NARROWEST = 0.4


class Grid(NamedTuple):
    """Scales and zero points of one linear, float32, (out, groups) each."""

    scale: Tensor
    zero_point: Tensor


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """The inputs in their groups: (out, in) -> (out, groups, group)."""
    return weight.reshape(weight.shape[0], scheme.groups(weight.shape[1]), -1)


def range_of(weight: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of every group, 0 included: (out, in) -> two of (out, groups) float32."""
    groups = grouped(weight.float(), scheme)
    return groups.amin(dim=-1).clamp_max(0), groups.amax(dim=-1).clamp_min(0)


def grid_of_range(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid whose ends are the ends of a range that contains 0. low <= 0 <= high, (out, groups)."""
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scale = rounded_scale((high - low) / scheme.steps, scale_dtype)
    if scheme.symmetric:
        return Grid(scale, torch.zeros_like(scale))
    zero_point = (scheme.lowest - low / scale).round().clamp(scheme.lowest, scheme.highest)
    return Grid(scale, zero_point)


def rounded_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Scales of any shape as they are stored, back in float32; never below the dtype's smallest normal number, so never 0."""
    limits = torch.finfo(scale_dtype)
    return scale.clamp(limits.smallest_normal, limits.max).to(scale_dtype).float()


def min_max_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid that spans every group's smallest to largest weight; weight (out, in) in any float dtype."""
    return grid_of_range(*range_of(weight, scheme), scheme, scale_dtype)


def searched_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """For every group the narrowed range with the least squared rounding error.

    weight (out, in) in any float dtype; importance (in,) weighs the errors of the inputs, None weighs them alike.

    Returns:
        Scales and zero points, (out, groups) float32 each.
    """
    low, high = range_of(weight, scheme)
    best = grid_of_range(low, high, scheme, scale_dtype)
    least = rounding_error(weight, best, scheme, importance)
    for step in range(1, SEARCH_STEPS + 1):
        share = 1 - (1 - NARROWEST) * step / SEARCH_STEPS
        grid = grid_of_range(low * share, high * share, scheme, scale_dtype)
        error = rounding_error(weight, grid, scheme, importance)
        better = error < least
        least = torch.where(better, error, least)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
    return best


def rounding_error(weight: Tensor, grid: Grid, scheme: Scheme, importance: Tensor | None = None) -> Tensor:
    """Sum over each group of importance * (W - W')^2, (out, groups) float32; weight (out, in), importance (in,)."""
    difference = weight.float() - from_codes(to_codes(weight, grid, scheme), grid, scheme)
    squares = difference.square() if importance is None else difference.square() * importance
    return grouped(squares, scheme).sum(dim=-1)


def to_codes(weight: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The nearest code of every weight: (out, in) -> whole numbers (out, in) float32."""
    scaled = grouped(weight.float(), scheme) / grid.scale.unsqueeze(-1)
    return (scaled.round() + grid.zero_point.unsqueeze(-1)).clamp(scheme.lowest, scheme.highest).flatten(1)


def from_codes(codes: Tensor, grid: Grid, scheme: Scheme, stored: torch.dtype = torch.float32) -> Tensor:
    """The weights of codes, (out, in) float32; rounded as readers round that multiply in the scale's `stored` dtype."""
    steps = (grouped(codes, scheme) - grid.zero_point.unsqueeze(-1)).flatten(1)
    weight = (grouped(steps, scheme) * grid.scale.unsqueeze(-1)).flatten(1)
    return weight.to(stored).float()
