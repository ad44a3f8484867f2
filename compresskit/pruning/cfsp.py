"""CFSP: coarse-to-fine structured pruning by activation importance.

CFSP, arXiv 2409.13199. Coarse (section 3.2, pruning/allocation.py): a block that rotates its hidden states more, measured
by the mean angular distance between input and output, keeps more channels. Fine (section 3.3): inside a block,

    share_M[j] = sum |M_j| / sum over all channels of sum |M|                                          (1)
    score_j = (share_down[j] + share_up[j] + share_gate[j]) * n_j^c                                    (2)

symbol  meaning                                              shape             name here
M_j     channel j of a matrix: a row of gate or up,          (hidden,)
        a column of down (weighted by n_j^b)
n_j     ||X_j||_2 of the inputs of down                      (width,)          input_norm
b, c    exponents, 1 in the paper                                              down_exponent, norm_exponent
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from compresskit.pruning.method import Allocation, PruneMethod

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from compresskit.pruning.channels import Channels


def shares(mass: Tensor) -> Tensor:
    """Equation 1: each channel's share of a matrix. mass (width,) -> (width,), sums to 1."""
    return mass / mass.sum()


def shares_score(inputs: Sequence[Tensor], down: Tensor, input_norm: Tensor) -> Tensor:
    """Equation 2, normalised across channels. inputs (width, hidden) each, down (hidden, width) -> (width,)."""
    total = shares(down.float().abs().sum(dim=0) * input_norm)
    for matrix in inputs:
        total = total + shares(matrix.float().abs().sum(dim=1))
    return total * input_norm


class CFSP(PruneMethod, frozen=True):
    """Coarse-to-fine activation importance."""

    allocation: Allocation = "cfsp"
    """Distribution of the sparsity over blocks: cfsp (block importance), uniform, or global (one threshold for all channels)."""
    score: Literal["shares", "released"] = "shares"
    """Fine score: shares (across channels) or released (the activation norm, to which the released code reduces)."""

    def channel_scores(self, channels: Channels) -> Tensor:
        """Equation 2, or only the activation norm; (width,)."""
        if self.score == "released":
            return channels.input_norm
        return shares_score(channels.inputs, channels.down, channels.input_norm)
