"""How much a block changes its inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.walk.sequence import OnBlock
from compresskit.walk.walk import Walk


class AngularDistance:
    """Mean over tokens of arccos(cosine(before, after)) / pi, the block influence of CFSP (arXiv 2409.13199)."""

    def __init__(self) -> None:
        self.found: list[tuple[float, int]] = []

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add one micro-batch, before and after (..., hidden)."""
        cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        total = float((cosine.clamp(-1, 1).arccos() / math.pi).double().sum(dim=-1).sum())
        self.found.append((total, cosine.numel()))

    def share(self, micro_batches: int) -> None:
        """Make the sums those of all ranks, which have so many micro-batches together."""
        self.found = distributed.in_order(self.found, micro_batches)

    @property
    def mean(self) -> float:
        """Mean over all tokens, 0 to 1."""
        return sum(total for total, _ in self.found) / max(1, sum(tokens for _, tokens in self.found))


def block_distances(walk: Walk, on_block: OnBlock) -> Iterator[float]:
    """Mean angular distance between each block's input and output in the walk's model."""
    for block in walk:
        distance = AngularDistance()
        for before, after in block.steps():
            distance.add(before, after)
        distance.share(block.micro_batches)
        yield distance.mean
        on_block("block importance", block.index + 1, walk.model.block_count)
