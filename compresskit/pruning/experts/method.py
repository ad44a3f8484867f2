"""What a method that removes experts must provide: a score for every expert of a block; one that merges, groups and alignments.

symbol   meaning                                                        shape             name here
N, K     experts of a block before and after                                              count, kept
k        experts that a token gets
g_e(t)   what multiplies expert e's output for token t, 0 if not chosen (tokens, N)       weights
f_e(x)   output of expert e                                             (tokens, hidden)
S_e      score of an expert                                             (N,)              scores

The K experts of the highest scores stay, the same number in every block, because a plain config.json holds one number. The
router loses the rows of the others. Ours, for every method (refit.py): the kept experts' output projections are refitted, by
least squares, to what the original's experts gave.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from compresskit.stages import Method

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.experts.evidence import Evidence
    from compresskit.pruning.experts.scores import ExpertStatistics


class ExpertsMethod(Method):
    """Fewer experts in every block."""

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of the experts to remove; rounded to whole experts."""
    experts: Annotated[int | None, Field(ge=1)] = None
    """Number of experts that stay in every block, in place of a share."""
    refit: bool = True
    """Refit the output projections of the experts that stay to the original's output by least squares."""
    ridge: Annotated[float, Field(gt=0)] = 0.05
    """Weight of staying near the old weights in the refit, as a share of the inputs' mean second moment."""

    needs_statistics: ClassVar[bool] = True
    """Whether the scores look at calibration text."""

    def kept_of(self, count: int, groups: int = 1) -> int:
        """How many of `count` experts stay; of a router with equal groups of experts, as many of each."""
        if self.experts is not None:
            return self.experts
        return count - groups * round(self.sparsity * count / groups)

    def scores(self, seen: ExpertStatistics, block: int) -> Tensor:
        """The score of every expert of block `block`, (N,) float64; the highest stay."""
        raise TypeError(f"{type(self).__name__} defines no scores")


class MergingMethod(ExpertsMethod):
    """Experts that go are merged into alike ones that stay.

        W_c <- sum_i w_i P_i W_i / sum_i w_i    over the group of expert c, P_c = I

    P_i puts the neurons of expert i in the order of those of c that they are most alike; the same permutation of the rows of
    the input projections and of the columns of the output projection leaves the expert's function as it is.
    """

    refit_router: bool = True
    """Refit the router's rows of merged experts to what the rows of their groups say together."""

    needs_outputs: ClassVar[bool] = False
    """Whether outputs and activations of all experts on some of the text are compared."""

    def weights(self, seen: ExpertStatistics) -> Tensor:
        """w: the weight of each expert in its group's mean, (N,) float64."""
        raise TypeError(f"{type(self).__name__} defines no weights")

    def similarity(self, evidence: Evidence) -> Tensor:
        """How alike every two experts are, (N, N) float64."""
        raise TypeError(f"{type(self).__name__} defines no similarity")

    def groups_of(self, scores: list[float], similarity: list[list[float]], cores: list[int]) -> list[list[int]]:
        """The group of each of `cores`, itself first; every expert is in one."""
        raise TypeError(f"{type(self).__name__} defines no groups")

    def likeness(self, core: Tensor, other: Tensor, activations: Tensor | None) -> Tensor:
        """How alike the neurons of two experts are, (width, width) float64; an assignment makes the sum largest."""
        # core, other: a row a neuron (alignment.py); activations: with `needs_outputs`, cosines of the neurons', (width, width).
        raise TypeError(f"{type(self).__name__} defines no likeness")
