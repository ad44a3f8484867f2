"""Frequency: remove the experts that the fewest tokens chose, a usual baseline.

S_e = |{t : e chosen for t}| / (k T)                                                                   (1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.pruning.experts.method import ExpertsMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.experts.scores import ExpertStatistics


class Frequency(ExpertsMethod, frozen=True):
    """How often an expert is chosen."""

    def scores(self, seen: ExpertStatistics, block: int) -> Tensor:
        """Equation 1, (N,) float64."""
        return seen.tokens_of / seen.tokens_of.sum().clamp_min(1)
