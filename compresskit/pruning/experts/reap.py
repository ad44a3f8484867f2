"""REAP: remove the experts that add least where they are chosen (arXiv 2510.13999, equation 9).

    S_e = mean over {t : e chosen for t} of  g_e(t) ||f_e(x_t)||_2 ,   0 if no token chose e                (1)
    S_e = sum over them, in place of the mean, with --score total: what e adds to the block in all          (2)

Differs from the released code: g is what the model itself multiplies by, normalised over the chosen experts or not, and an
average is over all tokens, not over the averages of batches. (2) is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compresskit.pruning.experts.method import ExpertsMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.experts.scores import ExpertStatistics


class REAP(ExpertsMethod, frozen=True):
    """Router-weighted norm of the experts' outputs."""

    score: Literal["mean", "total"] = "mean"
    """What a token adds where an expert is chosen (mean), or what all of them do (total)."""

    def scores(self, seen: ExpertStatistics, block: int) -> Tensor:
        """Equation 1 or 2, (N,) float64."""
        return seen.strengths if self.score == "total" else seen.strengths / seen.tokens_of.clamp_min(1)
