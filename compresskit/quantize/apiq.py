"""ApiQ with saliency-aware regularisation and learned rounding: train each block's quantisation on its output error.

ApiQ, arXiv 2402.05147, section 4 (block-wise form), with the regulariser of arXiv 2504.13932 and the rounding offsets of
SignRound, arXiv 2309.05516. Two streams of hidden states go through the model: X of the original blocks, X' of the
quantised ones. For each block, from the starting point that GPTQ's recursion gives on X', minimise

    ||block_q(X') - block(X)||^2 / ||start||^2  +  lambda * sum_W mean(F_W * (W_q - W)^2) / mean((W_start - W)^2)        (1)

    W_q = s * (clamp(round(T / s + z + V), lowest, highest) - z) + B A                                                   (2)
    s, z = grid(sigmoid(g_low) / sigmoid(g_0) * low, sigmoid(g_high) / sigmoid(g_0) * high)                              (3)

symbol         meaning                                             shape           name here
W              original weight                                     (out, in)       original
T              what GPTQ rounds: W and the errors passed on        (out, in)       target
V              rounding offset, in [-1/2, 1/2], 0 at the start     (out, in)       offset
low, high      range of each group of W                            (out, groups)
g_low, g_high  clipping parameters, g_0 = 4 at the start           (out, groups)   clipping
A, B           low-rank pair, from the error's best rank-r part    (r, in), (out, r)
F_W            saliency, mean 1                                    (out, in)       saliency

round and clamp pass gradients straight through (clamp only inside the range). Both terms of (1) are relative to the
starting point, so lambda has no unit. V and g follow the sign of their gradient with a rate that falls linearly to 0, A and
B AdamW. The trained block replaces the starting point only where its error over all windows is smaller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.grid import grid_of_range, grouped
from compresskit.scheme import Scheme

START_CLIPPING = 4.0


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """The value of `rounded` with the gradient of `exact`."""
    return exact + (rounded - exact).detach()


@dataclass
class TrainedLinear:
    """One linear in training: fixed tensors, and the parameters of equations 2 and 3."""

    original: Tensor
    target: Tensor
    low: Tensor
    high: Tensor
    scheme: Scheme
    scale_dtype: torch.dtype
    offset: Tensor
    clipping_low: Tensor
    clipping_high: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    saliency: Tensor | None = None

    def grid(self) -> tuple[Tensor, Tensor]:
        g0 = 1 / (1 + math.exp(-START_CLIPPING))
        low = self.low * (self.clipping_low.sigmoid() / g0)
        high = self.high * (self.clipping_high.sigmoid() / g0)
        scheme = self.scheme
        if scheme.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        with torch.no_grad():
            exact = grid_of_range(low, high, scheme, self.scale_dtype)
        scale = straight_through((high - low) / scheme.steps, exact.scale)
        return scale, exact.zero_point

    def codes(self, scale: Tensor, zero: Tensor) -> Tensor:
        position = (
            grouped(self.target, self.scheme) / scale.unsqueeze(-1) + zero.unsqueeze(-1) + grouped(self.offset, self.scheme)
        )
        return straight_through(position, position.round()).clamp(self.scheme.lowest, self.scheme.highest)

    def weight(self) -> Tensor:
        scale, zero = self.grid()
        weight = ((self.codes(scale, zero) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)
        return weight if self.first is None else weight + self.second @ self.first
