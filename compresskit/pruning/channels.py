"""One feed-forward network as its channels: what scoring, keeping and refitting work on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.walk.statistics import Gram, Moments


@dataclass(frozen=True)
class Channels:
    """The weights of one feed-forward network and the statistics of its channels' activations.

    `inputs`: one (width, hidden) matrix for every input projection (gate and up, or one);
    `down`: (hidden, width). `activations`: moments of the inputs of `down`; None without calibration text.
    """

    inputs: tuple[Tensor, ...]
    down: Tensor
    activations: Moments | Gram | None
    block: int
    member: int
    """Number of the expert, 0 where there are none."""

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.down.shape[1]

    @property
    def input_norm(self) -> Tensor:
        """||X_j||_2 of every channel, (width,); ones where no token reached this network."""
        if self.activations is None or self.activations.tokens == 0:
            return torch.ones(self.width, device=self.down.device)
        return self.activations.squares.clamp_min(0).sqrt().to(self.down)


def input_matrices(weight: Tensor, fused: int) -> tuple[Tensor, ...]:
    """Split an input projection (fused * width, hidden) into its `fused` matrices (width, hidden)."""
    return tuple(weight.chunk(fused))


def kept_rows(weight: Tensor, kept: Tensor, fused: int) -> Tensor:
    """Keep channels of an input projection or its bias: (fused * width, ...) -> (fused * kept, ...)."""
    return torch.cat([part[kept] for part in weight.chunk(fused)])
