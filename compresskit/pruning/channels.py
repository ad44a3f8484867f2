"""A feed-forward network as a set of channels that can be scored, kept and refitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.models.model import FfnGroup
from compresskit.numerics.rows import join_rows, split_rows
from compresskit.walk.block import Block
from compresskit.walk.statistics import Gram, Moments

ChannelStatistics = dict[str, Moments | Gram]
"""Statistics of the channels' activations, by the name of the output projection."""


@dataclass(frozen=True)
class Channels:
    """Weights of one feed-forward network and statistics of its channels' activations.

    `inputs`: one (width, hidden) matrix per input projection (gate and up, or one);
    `down`: (hidden, width). `activations`: moments of the inputs of `down`; None without calibration text.
    """

    inputs: tuple[Tensor, ...]
    down: Tensor
    activations: Moments | Gram | None
    block: int
    member: int
    """Number of the expert, 0 without experts."""

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.down.shape[1]

    @property
    def input_norm(self) -> Tensor:
        """||X_j||_2 of every channel, (width,); ones if no token reached this network."""
        if self.activations is None or self.activations.tokens == 0:
            return torch.ones(self.width, device=self.down.device)
        return self.activations.squares.clamp_min(0).sqrt().to(self.down)


def kept_rows(weight: Tensor, kept: Tensor, group: FfnGroup) -> Tensor:
    """Keep channels of an input projection or its bias: (fused * width, ...) -> (fused * kept, ...)."""
    parts = split_rows(weight, group.fused, group.interleaved)
    return join_rows([part[kept] for part in parts], group.interleaved)


def collected(groups: list[FfnGroup], covariance: bool, block: Block, device: torch.device, advance: bool) -> ChannelStatistics:
    """Collect statistics of these networks' channels over all micro-batches; `advance` if the block is not edited."""
    kind = Gram if covariance else Moments
    statistics = {ffn.out_projection: kind(group.width, device) for group in groups for ffn in group.members}
    if advance:
        block.advance(statistics)
    else:
        block.collect(statistics, attention_is_final=True, only_it_changes=True, comparing=True)
    return statistics


def channels_of(block: Block, group: FfnGroup, member: int, statistics: ChannelStatistics) -> Channels:
    """The channels of one network of a group."""
    ffn = group.members[member]
    inputs = [block.linear(name).weight for name in ffn.in_projections]
    matrices = [each for weight in inputs for each in split_rows(weight, group.fused, group.interleaved)]
    down = block.linear(ffn.out_projection).weight
    return Channels(tuple(matrices), down, statistics.get(ffn.out_projection), block.index, member)
