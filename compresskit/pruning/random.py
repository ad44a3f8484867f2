"""Random: remove channels by chance, from the seed. The floor that any criterion has to beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compresskit.pruning.method import PruneMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.channels import Channels

BLOCK_STRIDE = 1_000_003
"""A prime larger than any number of experts, so that no two networks draw the same channels."""


class Random(PruneMethod, frozen=True):
    """Channels drawn by chance."""

    needs_activations: ClassVar[bool] = False
    draw: int = 0
    """Another draw of channels."""

    def channel_scores(self, channels: Channels) -> Tensor:
        """Numbers drawn for this network alone, (width,)."""
        import torch  # method files load without torch

        generator = torch.Generator().manual_seed(self.draw + BLOCK_STRIDE * (channels.block + 1) + channels.member)
        return torch.rand(channels.width, generator=generator).to(channels.down.device)
