"""Choose how many channels each block keeps: ratios from importances, then rounded widths that meet the target.

A "group" is one width to choose (one FFN, or all experts of a block). The rules are pure functions of numbers; `allocate`
measures their inputs: `cfsp` and `global` walk the dense model once, `uniform` needs no walk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compresskit.models.layouts import Widths
from compresskit.models.model import FfnGroup, Model
from compresskit.pruning.channels import channels_of, collected
from compresskit.pruning.influence import block_distances
from compresskit.pruning.method import PruneMethod
from compresskit.walk.sequence import OnBlock
from compresskit.walk.walk import Walk

CFSP_SHARPNESS = 13.1072
"""The released code sums the angular distance over 128 x 1024 tokens and divides by 1e4: this factor times the mean."""
LARGEST_RATIO = 1.0


@dataclass(frozen=True)
class Group:
    """One width to choose: its full size, and the number of networks (experts) that share it."""

    block: int
    width: int
    members: int = 1


def cfsp_ratios(importances: Sequence[float], sparsity: float, sharpness: float = 1.0) -> list[float]:
    """Share of its channels that each block keeps (CFSP, arXiv 2409.13199, section 3.2).

    s_l = sigmoid(sharpness * 13.1072 * (I_l - mean(I))), r_l = s_l / mean(s) * (1 - sparsity). If some r_l would exceed 1,
    the spread of s around its mean is shrunk until the largest is 1, so that the mean stays 1 - sparsity.

    `importances`: I_l by block, mean angular distances from 0 to 1.

    Returns:
        r_l by block, from 0 to 1.
    """
    mean = sum(importances) / len(importances)
    s = [1 / (1 + math.exp(-sharpness * CFSP_SHARPNESS * (value - mean))) for value in importances]
    return limited_ratios(s, 1 - sparsity)


def limited_ratios(weights: Sequence[float], mean_ratio: float) -> list[float]:
    """Ratios proportional to `weights` with the given mean; their spread is shrunk so that none exceeds 1."""
    mean = sum(weights) / len(weights)
    relative = [weight / mean for weight in weights]
    largest = max(relative)
    shrink = 1.0
    if largest * mean_ratio > LARGEST_RATIO:
        shrink = (LARGEST_RATIO / mean_ratio - 1) / (largest - 1)
    return [min(LARGEST_RATIO, mean_ratio * (1 + shrink * (value - 1))) for value in relative]


def global_ratios(scores: Sequence[Tensor], sparsity: float) -> list[float]:
    """Share of channels that each group keeps when all channels compete: scores (width,), standardised within each group."""
    standard = [(s.double() - s.double().mean()) / s.double().std().clamp_min(1e-30) for s in scores]
    everything = torch.cat(standard)
    kept = everything.numel() - round(sparsity * everything.numel())
    threshold = everything.sort(descending=True).values[max(0, kept - 1)]
    return [float((s >= threshold).double().mean()) for s in standard]


def round_widths(groups: Sequence[Group], ratios: Sequence[float], step: int, sparsity: float) -> list[int]:
    """Round `ratios` to widths in multiples of `step` (or the full width), with a sum as close to the target as possible.

    Every group keeps at least one step. Widths closest to a rounding boundary are moved first. The target is 1 - sparsity of
    all channels, counting every member of a group.

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
    """Round the requested share to the nearest multiple of `step`, equal for groups of equal width."""
    return [_nearest((1 - sparsity) * group.width, group.width, step) for group in groups]


def _nearest(wanted: float, full: int, step: int) -> int:
    allowed = [width for width in {step * math.floor(wanted / step), step * math.ceil(wanted / step), full} if 0 < width <= full]
    return min(allowed, key=lambda width: (abs(width - wanted), width)) if allowed else full


def _next(width: int, full: int, step: int, up: bool) -> int:
    """Return the next allowed width, or 0 if there is none."""
    if up:
        return 0 if width == full else min(full, width // step * step + step)
    lower = (width - 1) // step * step
    return max(lower, 0)


IMPORTANCE_SAMPLES = 16
"""Calibration windows for block importances: a mean over 8,192 tokens, a quarter of the time of 64 windows."""


@dataclass(frozen=True)
class Allocated:
    """Widths by block and group, and the block importances behind them (empty if none were needed)."""

    widths: Widths
    importances: list[float] = field(default_factory=list)


def allocate(method: PruneMethod, walk: Walk, on_block: OnBlock) -> Allocated:
    """Choose the width of every group of the walk's model."""
    model = walk.model
    groups = [group for index in range(model.block_count) for group in model.ffn_groups(index)]
    simple = [Group(group.block, group.width, len(group.members)) for group in groups]
    step = method.widths_step(max(group.width for group in groups))
    importances: list[float] = []
    if method.allocation == "uniform" or method.sparsity == 0:
        widths = uniform_widths(simple, method.sparsity, step)
    elif method.allocation == "global":
        ratios = global_ratios(list(_dense_scores(method, walk, on_block)), method.sparsity)
        widths = round_widths(simple, ratios, step, method.sparsity)
    else:
        importances = list(block_distances(walk.take(IMPORTANCE_SAMPLES), on_block))
        ratios = cfsp_ratios(importances, method.sparsity)
        widths = round_widths(simple, [ratios[group.block] for group in groups], step, method.sparsity)
    return Allocated(_by_block(model, groups, widths), importances)


def even_widths(method: PruneMethod, model: Model) -> Widths:
    """Widths with the same sum as `allocate`, equal in all blocks up to rounding: the estimate before the text is read."""
    groups = [group for index in range(model.block_count) for group in model.ffn_groups(index)]
    simple = [Group(group.block, group.width, len(group.members)) for group in groups]
    step = method.widths_step(max(group.width for group in groups))
    if method.allocation == "uniform" or method.sparsity == 0:
        return _by_block(model, groups, uniform_widths(simple, method.sparsity, step))
    return _by_block(model, groups, round_widths(simple, [1 - method.sparsity] * len(groups), step, method.sparsity))


def _by_block(model: Model, groups: list[FfnGroup], widths: list[int]) -> Widths:
    pairs = list(zip(groups, widths, strict=True))
    return [[width for group, width in pairs if group.block == index] for index in range(model.block_count)]


def _dense_scores(method: PruneMethod, walk: Walk, on_block: OnBlock) -> Iterator[Tensor]:
    """Scores of every group in the dense model, (width,) each; experts of a group are averaged."""
    for block in walk:
        groups = walk.model.ffn_groups(block.index)
        statistics = collected(groups, method.needs_covariance, block, walk.device, advance=True)
        for group in groups:
            members = range(len(group.members))
            scores = [method.channel_scores(channels_of(block, group, i, statistics)).cpu() for i in members]
            yield torch.stack(scores).mean(dim=0)
        on_block("channel scores", block.index + 1, walk.model.block_count)
