"""Wanda-sp: remove the channels with the smallest products of output weights and input norms.

Wanda, arXiv 2306.11695, equation 1; in structured form as in FLAP's comparison, arXiv 2312.11983, section 4.

    score_j = mean_i |W[i, j]| * ||X[:, j]||_2                                                       (1)

symbol  meaning                      shape             name here
W       output projection            (hidden, width)   down
X       its calibration inputs       (tokens, width)   only through input_norm (width,)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.pruning.method import PruneMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.channels import Channels


def weighted_norms(down: Tensor, input_norm: Tensor) -> Tensor:
    """Equation 1. down (hidden, width), input_norm (width,) -> (width,)."""
    return down.float().abs().mean(dim=0) * input_norm


class WandaSP(PruneMethod, frozen=True):
    """Weights times input norms."""

    def channel_scores(self, channels: Channels) -> Tensor:
        """Equation 1, (width,)."""
        return weighted_norms(channels.down, channels.input_norm)
