"""Magnitude: remove the channels with the smallest weights; without a refit no calibration text is needed.

Li et al., Pruning Filters for Efficient ConvNets, arXiv 1608.08710, section 3, applied to feed-forward channels:

    score_j = sum over the matrices M of the network of ||M_j||_2                                      (1)

symbol  meaning                                              shape
M_j     channel j of a matrix: a row of gate or up,          (hidden,)
        a column of the output projection
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compresskit.pruning.method import PruneMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compresskit.pruning.channels import Channels


def weight_norms(inputs: Sequence[Tensor], down: Tensor) -> Tensor:
    """Equation 1. inputs: (width, hidden) each, down (hidden, width) -> (width,)."""
    norms = [matrix.float().norm(dim=1) for matrix in inputs]
    total: Tensor = sum(norms, start=down.float().norm(dim=0))
    return total


class Magnitude(PruneMethod, frozen=True):
    """Norm of the weights alone."""

    needs_activations: ClassVar[bool] = False

    def channel_scores(self, channels: Channels) -> Tensor:
        """Equation 1, (width,)."""
        return weight_norms(channels.inputs, channels.down)
