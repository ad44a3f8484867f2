"""M-SMoE: merge each expert into the most alike of those that are chosen most (arXiv 2310.01334, sections 3.1 and 3.2).

    cores        the K experts that the most tokens chose                                                     (1)
    Sim(i, j)    = cos(l_i, l_j)    router logits over the calibration tokens; each other expert joins its
                 most alike core                                                                              (2)
    P_j          = argmax <[W_gate W_up]_c, P [W_gate W_up]_j> + <W_down,c , W_down,j P^T>                    (3)
    w_i          = |{t : i chosen for t}|                                                                     (4)

Differs from the paper: the number of experts is the same in every block, and the router has a row a group; the released file for
Mixtral keeps a row for every old expert, and does not align. The low-rank step after merging (MC-SMoE) is not made: quantize
the result. The refits of the router and of the output projections are ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.pruning.experts.method import MergingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.experts.evidence import Evidence
    from compresskit.pruning.experts.scores import ExpertStatistics


class MSMoE(MergingMethod, frozen=True):
    """Merged by the likeness of router logits."""

    def scores(self, seen: ExpertStatistics, block: int) -> Tensor:
        """Equation 1, (N,) float64."""
        return seen.tokens_of

    def weights(self, seen: ExpertStatistics) -> Tensor:
        """Equation 4, (N,) float64."""
        return seen.tokens_of

    def similarity(self, evidence: Evidence) -> Tensor:
        """Equation 2, (N, N) float64."""
        from compresskit.pruning.experts.evidence import cosines

        return cosines(evidence.logits)

    def groups_of(self, scores: list[float], similarity: list[list[float]], cores: list[int]) -> list[list[int]]:
        """Every expert joins its most alike core."""
        from compresskit.pruning.experts.grouping import join_nearest

        return join_nearest(similarity, cores)

    def likeness(self, core: Tensor, other: Tensor, activations: Tensor | None) -> Tensor:
        """Equation 3, (width, width) float64."""
        return core.double() @ other.double().T
