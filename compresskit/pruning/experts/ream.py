"""REAM: merge experts into those that add most where they are chosen (arXiv 2604.04356).

    S_e          as REAP: mean of g_e(t) ||f_e(x_t)|| over the tokens that chose e; the K highest are cores            (1)
    Sim(i, j)    = ((cos(o_i, o_j) + 1) / 2 + 1 - ||l_i - l_j|| / 2) / 2                                               (2)
    groups       in falling S each core takes up to C - 1 most alike experts that no other has taken                   (3)
    P_j          = argmin sum of ||a_c,n - a_j,P(n)|| + ||q_c,n - q_j,P(n)|| over the neurons n                        (4)
    w_i          = S_i                                                                                                 (5)

symbol   meaning
o_i      p_i(t) f_i(x_t) over the tokens of a few windows, p = softmax of the router logits
l_i      router logits of expert i over the calibration tokens, divided by their norm
a_e,n    activations of neuron n of expert e over those windows, divided by their norm
q_e,n    [gate row | up row | down column] of the neuron, divided by its norm
C        --group-size

Differs from the released code: outputs are compared token by token, not by their means; the mean of (1) is over tokens, not over
the means of batches; an expert that no token chose has score 0; (4) takes whole rows, not their 64 principal components.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from compresskit.pruning.experts.method import MergingMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.experts.evidence import Evidence
    from compresskit.pruning.experts.scores import ExpertStatistics


class REAM(MergingMethod, frozen=True):
    """Merged by the likeness of gated outputs and router logits."""

    group_size: Annotated[int, Field(ge=2)] = 16
    """Most experts of a group."""

    needs_outputs: ClassVar[bool] = True

    def scores(self, seen: ExpertStatistics, block: int) -> Tensor:
        """Equation 1, (N,) float64."""
        return seen.strengths / seen.tokens_of.clamp_min(1)

    def weights(self, seen: ExpertStatistics) -> Tensor:
        """Equation 5, (N,) float64."""
        return seen.strengths / seen.tokens_of.clamp_min(1)

    def similarity(self, evidence: Evidence) -> Tensor:
        """Equation 2, (N, N) float64."""
        from compresskit.pruning.experts.evidence import cosines

        assert evidence.outputs is not None
        apart = (2 - 2 * cosines(evidence.logits)).clamp_min(0).sqrt()
        return ((cosines(evidence.outputs) + 1) / 2 + 1 - apart / 2) / 2

    def groups_of(self, scores: list[float], similarity: list[list[float]], cores: list[int]) -> list[list[int]]:
        """Equation 3."""
        from compresskit.pruning.experts.grouping import take_nearest

        return take_nearest(scores, similarity, cores, self.group_size)

    def likeness(self, core: Tensor, other: Tensor, activations: Tensor | None) -> Tensor:
        """Equation 4 with its sign turned, (width, width) float64."""
        from torch.nn.functional import normalize

        assert activations is not None
        rows: Tensor = normalize(core.double(), dim=1) @ normalize(other.double(), dim=1).T
        return -(2 - 2 * activations).clamp_min(0).sqrt() - (2 - 2 * rows).clamp_min(0).sqrt()
