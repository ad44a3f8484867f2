"""Random experts: remove experts drawn by chance; `draw` is the seed. The floor that any score must beat."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compresskit.pruning.experts.method import ExpertsMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.experts.scores import ExpertStatistics

BLOCK_STRIDE = 1_000_003
"""A prime, so that no two blocks draw alike."""


class RandomExperts(ExpertsMethod, frozen=True):
    """Experts drawn by chance."""

    needs_statistics: ClassVar[bool] = False
    draw: int = 0
    """Seed of the drawn experts."""

    def scores(self, seen: ExpertStatistics, block: int) -> Tensor:
        """Random numbers drawn for this block, (N,) float64."""
        import torch  # method files do not import torch at module level

        generator = torch.Generator().manual_seed(self.draw + BLOCK_STRIDE * (block + 1))
        return torch.rand(len(seen.tokens_of), generator=generator, dtype=torch.float64)
