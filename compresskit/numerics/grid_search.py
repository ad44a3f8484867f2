"""Narrow the range of every group to the one with the least rounding error."""

from __future__ import annotations

import torch
from torch import Tensor

from compresskit.numerics.grid import Grid, from_codes, grid_of_range, grouped, range_of, to_codes
from compresskit.numerics.scheme import Scheme

SEARCH_STEPS = 32
"""Number of ranges in the error search: the full one, then equal steps down to `NARROWEST`."""
NARROWEST = 0.4


def searched_grid(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype, importance: Tensor | None = None) -> Grid:
    """For every group, find the narrowed range with the least squared rounding error.

    weight (out, in) in any float dtype; importance (in,) weights the inputs' errors, None weights them equally.

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
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid[:2], best[:2], strict=True)))
    return best


def rounding_error(weight: Tensor, grid: Grid, scheme: Scheme, importance: Tensor | None = None) -> Tensor:
    """Sum of importance * (W - W')^2 over each group, (out, groups) float32; weight (out, in), importance (in,)."""
    difference = weight.float() - from_codes(to_codes(weight, grid, scheme), grid, scheme)
    squares = difference.square() if importance is None else difference.square() * importance
    return grouped(squares, scheme).sum(dim=-1)
