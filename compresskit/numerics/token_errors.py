"""Error of hidden states by token, relative to the token's own size, but no less than to the usual one.

    e_t = mean(f (y_t - h_t)^2) / max(mean(f h_t^2), least)                                               (1)

symbol  meaning                                        shape        name here
h       wanted hidden states                           (..., hidden)  target
y       those that came out                            (..., hidden)  output
f       weight of each channel, of mean 1              (hidden,)    channels
least   smallest energy by which an error is divided                least

With the median over tokens of mean(f h_t^2) as `least`, a token of massive activations counts no more than any other, and one of
small ones no more than its error. A plain mean is there the error of one token in five hundred (docs/evidence/quantize.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST_ENERGY = 1e-12
"""Keeps the relative error finite for hidden states that are 0."""


def mean_square(hidden: Tensor, channels: Tensor | None) -> Tensor:
    """Mean over the last dimension of f * hidden^2, float32; `channels`: f, of mean 1, or None for equal weights."""
    squares = hidden.float().square()
    return (squares if channels is None else squares * channels).mean(dim=-1)


def usual_energy(hidden: Sequence[Tensor], channels: Tensor | None) -> float:
    """Median over tokens of the mean square of a hidden state, of hidden (..., hidden)."""
    found = [mean_square(each, channels).flatten() for each in hidden]
    return max(SMALLEST_ENERGY, float(torch.cat(found).median())) if found else SMALLEST_ENERGY


def token_errors(output: Tensor, target: Tensor, channels: Tensor | None, least: float | None) -> Tensor:
    """Equation 1: output and target (..., hidden) -> (...,) float32; None as `least` divides by nothing."""
    squares = mean_square(output.float() - target.float(), channels)
    return squares if least is None else squares / mean_square(target, channels).clamp_min(least)
