"""Rows of a matrix that holds several projections, one after the other or in turn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def split_rows(weight: Tensor, count: int, interleaved: bool = False) -> tuple[Tensor, ...]:
    """Split (count * width, ...) into `count` tensors (width, ...); `interleaved`: row i belongs to part i mod count."""
    return tuple(weight[number::count] for number in range(count)) if interleaved else tuple(weight.chunk(count))


def join_rows(parts: Sequence[Tensor], interleaved: bool = False) -> Tensor:
    """Inverse of `split_rows`."""
    return torch.stack(list(parts), dim=1).flatten(0, 1) if interleaved else torch.cat(list(parts))
