"""How many channels each block keeps: ratios from importances, then widths that are multiples and meet the target.

Pure functions of numbers; a "group" is one width to choose (one FFN, or all experts of a block).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CFSP_SHARPNESS = 13.1072
"""The released code sums the angular distance over 128 x 1024 tokens and divides by 1e4: this times the mean."""
LARGEST_RATIO = 1.0


@dataclass(frozen=True)
class Group:
    """One width to choose: the full one, and how many networks (experts) will have it."""

    block: int
    width: int
    members: int = 1


def cfsp_ratios(importances: Sequence[float], sparsity: float, sharpness: float = 1.0) -> list[float]:
    """Share of its channels that each block keeps (CFSP, arXiv 2409.13199, section 3.2).

    s_l = sigmoid(sharpness * 13.1072 * (I_l - mean(I))), r_l = s_l / mean(s) * (1 - sparsity); where some r_l would
    exceed 1, the spread of s around its mean is shrunk until the largest is 1, so that the mean stays 1 - sparsity.

    `importances`: I_l by block, mean angular distances from 0 to 1.

    Returns:
        r_l by block, from 0 to 1.
    """
    mean = sum(importances) / len(importances)
    s = [1 / (1 + math.exp(-sharpness * CFSP_SHARPNESS * (value - mean))) for value in importances]
    return limited_ratios(s, 1 - sparsity)


def limited_ratios(weights: Sequence[float], mean_ratio: float) -> list[float]:
    """Ratios proportional to `weights` with the given mean, their spread shrunk so that none exceeds 1."""
    mean = sum(weights) / len(weights)
    relative = [weight / mean for weight in weights]
    largest = max(relative)
    shrink = 1.0
    if largest * mean_ratio > LARGEST_RATIO:
        shrink = (LARGEST_RATIO / mean_ratio - 1) / (largest - 1)
    return [min(LARGEST_RATIO, mean_ratio * (1 + shrink * (value - 1))) for value in relative]


def global_ratios(scores: Sequence[Tensor], sparsity: float) -> list[float]:
    """Share of its channels each group keeps when all channels compete: scores (width,) standardised in each group."""
    standard = [(s.double() - s.double().mean()) / s.double().std().clamp_min(1e-30) for s in scores]
    everything = torch.cat(standard)
    kept = everything.numel() - round(sparsity * everything.numel())
    threshold = everything.sort(descending=True).values[max(0, kept - 1)]
    return [float((s >= threshold).double().mean()) for s in standard]


def round_widths(groups: Sequence[Group], ratios: Sequence[float], step: int, sparsity: float) -> list[int]:
    """Widths in multiples of `step` (or the full width) near `ratios`, their sum as near the target as steps allow.

    Every group keeps at least one step. Widths next to a rounding boundary are moved first. The target: 1 - sparsity of
    all channels, those of every member of a group counted.

    Returns:
        Channels to keep, by group.
    """
    wanted = [ratio * group.width for ratio, group in zip(ratios, groups, strict=True)]
    widths = [_nearest(want, group.width, step) for want, group in zip(wanted, groups, strict=True)]
    target = (1 - sparsity) * sum(group.width * group.members for group in groups)
    while True:
        excess = sum(width * group.members for width, group in zip(widths, groups, strict=True)) - target
        moves = []
        for index, group in enumerate(groups):
            moved = _next(widths[index], group.width, step, up=excess < 0)
            change = (moved - widths[index]) * group.members
            if moved and change and abs(excess + change) < abs(excess):
                moves.append((abs(moved - wanted[index]) - abs(widths[index] - wanted[index]), index, moved))
        if not moves:
            return widths
        _, index, moved = min(moves)
        widths[index] = moved


def uniform_widths(groups: Sequence[Group], sparsity: float, step: int) -> list[int]:
    """The multiple of `step` nearest to the asked share, the same for groups of the same width."""
    return [_nearest((1 - sparsity) * group.width, group.width, step) for group in groups]


def _nearest(wanted: float, full: int, step: int) -> int:
    allowed = [width for width in {step * math.floor(wanted / step), step * math.ceil(wanted / step), full} if 0 < width <= full]
    return min(allowed, key=lambda width: (abs(width - wanted), width)) if allowed else full


def _next(width: int, full: int, step: int, up: bool) -> int:
    """The next allowed width, or 0 where there is none."""
    if up:
        return 0 if width == full else min(full, width // step * step + step)
    lower = (width - 1) // step * step
    return max(lower, 0)
