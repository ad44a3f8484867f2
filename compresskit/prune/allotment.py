"""Widths for every block of a model: the allocation rules of prune/allocation.py, fed from the model.

`cfsp` and `global` walk the dense model once; `uniform` needs no walk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compresskit.layouts import Widths
from compresskit.model import FfnGroup, Model
from compresskit.prune.allocation import Group, cfsp_ratios, global_ratios, round_widths, uniform_widths
from compresskit.prune.structured import channels_of, collected
from compresskit.stages import PruneMethod
from compresskit.stagewise import OnBlock
from compresskit.statistics import AngularDistance
from compresskit.walk import Walk

IMPORTANCE_SAMPLES = 16
"""Calibration windows from which block importances are measured: a mean over 8,192 tokens, and a quarter of the time of 64."""


@dataclass(frozen=True)
class Allotment:
    """Widths by block and group, and the block importances they were found from (empty where none were needed)."""

    widths: Widths
    importances: list[float] = field(default_factory=list)


def allot(method: PruneMethod, walk: Walk, on_block: OnBlock) -> Allotment:
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
        importances = list(_block_importances(walk.take(IMPORTANCE_SAMPLES), on_block))
        ratios = cfsp_ratios(importances, method.sparsity)
        widths = round_widths(simple, [ratios[group.block] for group in groups], step, method.sparsity)
    return Allotment(_by_block(model, groups, widths), importances)


def _by_block(model: Model, groups: list[FfnGroup], widths: list[int]) -> Widths:
    pairs = list(zip(groups, widths, strict=True))
    return [[width for group, width in pairs if group.block == index] for index in range(model.block_count)]


def _block_importances(walk: Walk, on_block: OnBlock) -> Iterator[float]:
    """Mean angular distance between each block's input and output, in the dense model."""
    for block in walk:
        distance = AngularDistance()
        for before, after in block.advance():
            distance.add(before, after)
        yield distance.mean
        on_block("block importance", block.index + 1, walk.model.block_count)


def _dense_scores(method: PruneMethod, walk: Walk, on_block: OnBlock) -> Iterator[Tensor]:
    """Scores of every group in the dense model, (width,) each; experts of a group share their mean."""
    for block in walk:
        groups = walk.model.ffn_groups(block.index)
        statistics = collected(groups, method.needs_covariance, block, walk.device, advance=True)
        for group in groups:
            members = range(len(group.members))
            scores = [method.channel_scores(channels_of(block, group, i, statistics)).cpu() for i in members]
            yield torch.stack(scores).mean(dim=0)
        on_block("channel scores", block.index + 1, walk.model.block_count)
