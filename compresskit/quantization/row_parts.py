"""Round a matrix whose rows have their own second moments by group, group after group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.numerics.grid import Grid
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.energies import output_energies
from compresskit.quantization.error_feedback import feedback, round_with_feedback
from compresskit.walk.statistics import Gram


class RoundedRows(NamedTuple):
    """Result of all groups."""

    codes: Tensor
    """(out, in) float32."""
    losses: Tensor
    """(out,) float64: the squared error of every output, in the unit of its group's second moments."""
    energies: Tensor
    """(out,) float64: the square of every output in the same unit."""


def round_parts(
    weight: Tensor, parts: Sequence[tuple[int, Gram]], grid: Grid, scheme: Scheme, damping: float, ordered: bool
) -> RoundedRows:
    """Run the recursion of error_feedback.py over every group of the rows of a weight (out, in).

    `parts`: (number of rows, sums of their second moments); one for all where nothing guides.

    Returns:
        The results of all rows, in their order.
    """
    found, start = [], 0
    for count, gram in parts:
        rows = slice(start, start := start + count)
        passed = feedback(gram.matrix().div_(gram.tokens), damping, ordered)
        rounded = round_with_feedback(weight[rows], passed, Grid(grid.scale[rows], grid.zero_point[rows]), scheme)
        found.append((rounded.codes, rounded.losses, output_energies(weight[rows], passed)))
    return RoundedRows(*(torch.cat(each) for each in zip(*found, strict=True)))
