"""Random: remove randomly drawn channels; `draw` is the seed. The baseline that any criterion must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compresskit.pruning.method import PruneMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.channels import Channels

BLOCK_STRIDE = 1_000_003
"""A prime larger than any number of experts, so that no two networks draw the same channels."""


class Random(PruneMethod, frozen=True):
    """Randomly drawn channels."""

    needs_activations: ClassVar[bool] = False
    draw: int = 0
    """Seed of the drawn channels."""

    def channel_scores(self, channels: Channels) -> Tensor:
        """Random numbers drawn for this network, (width,)."""
        import torch  # method files do not import torch at module level

        generator = torch.Generator().manual_seed(self.draw + BLOCK_STRIDE * (channels.block + 1) + channels.member)
        return torch.rand(channels.width, generator=generator).to(channels.down.device)
