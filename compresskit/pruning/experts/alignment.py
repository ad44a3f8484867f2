"""An expert as a matrix with a row a neuron, whose rows can be put in any order: [gate row | up row | down column].

Rows of the input projections with their biases and columns of the output projection; the bias of the output belongs to no
neuron. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from compresskit.numerics.rows import join_rows, split_rows


class Layout(NamedTuple):
    """How the input projections hold a neuron's rows (`FfnGroup`)."""

    fused: int = 1
    interleaved: bool = False


def neurons(linears: Sequence[nn.Linear], layout: Layout) -> Tensor:
    """A row a neuron, (width, parts) float32; `linears`: the input projections, then the output projection."""
    columns = []
    for linear in linears[:-1]:
        columns += [part.float() for part in split_rows(linear.weight.detach(), *layout)]
        if linear.bias is not None:
            columns += [part.float()[:, None] for part in split_rows(linear.bias.detach(), *layout)]
    return torch.cat([*columns, linears[-1].weight.detach().float().T], dim=1)


def put_neurons(linears: Sequence[nn.Linear], layout: Layout, rows: Tensor) -> None:
    """Inverse of `neurons`: give the linears the weights in `rows`."""
    sizes = []
    for linear in linears[:-1]:
        sizes += [linear.in_features] * layout.fused + ([1] * layout.fused if linear.bias is not None else [])
    parts = list(torch.split(rows, [*sizes, linears[-1].out_features], dim=1))
    for linear in linears[:-1]:
        _put(linear, "weight", join_rows([parts.pop(0) for _ in range(layout.fused)], layout.interleaved))
        if linear.bias is not None:
            _put(linear, "bias", join_rows([parts.pop(0)[:, 0] for _ in range(layout.fused)], layout.interleaved))
    _put(linears[-1], "weight", parts.pop().T)


def _put(linear: nn.Linear, leaf: str, value: Tensor) -> None:
    old: Tensor = getattr(linear, leaf)
    linear.register_parameter(leaf, nn.Parameter(value.to(old).contiguous(), requires_grad=False))


def assigned(likeness: Tensor) -> Tensor:
    """Row i's partner in the assignment of the largest sum, (width,) int64; `likeness` (width, width)."""
    _, columns = linear_sum_assignment(likeness.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(likeness.device)


def merged(each: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted mean of tensors of one shape, in float64; the first if no weight is positive."""
    whole = sum(weights)
    if whole <= 0:
        return each[0].double()
    found = torch.zeros_like(each[0], dtype=torch.float64)
    for tensor, weight in zip(each, weights, strict=True):
        found += (weight / whole) * tensor.double()
    return found
