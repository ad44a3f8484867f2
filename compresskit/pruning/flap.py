"""FLAP: remove the channels whose activations fluctuate least, and add their mean back as an output bias.

FLAP, arXiv 2312.11983, equations 4 to 6 (structure WIFV, search AL-AM of its released code).

    score_j = var(X[:, j]) * ||W[:, j]||_2^2                                                          (1)
    bias    = mean(X) W^T - mean(X_S) W'^T                                                            (2)

symbol  meaning                      shape             name here
W       output projection            (hidden, width)   down
X       its calibration inputs       (tokens, width)   only through variance, mean (width,)
S, W'   kept channels, new weights                     kept, new_down

Scores are standardised within each block and all channels compete (`allocation="global"`).
Differs from the paper: attention heads are not pruned. With a refit, (2) uses the refitted weights W', which is never
worse than either alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.pruning.method import Allocation, PruneMethod

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.channels import Channels


def fluctuation(variance: Tensor, down: Tensor) -> Tensor:
    """Equation 1. variance (width,), down (hidden, width) -> (width,)."""
    return variance.to(down) * down.float().square().sum(dim=0)


def output_bias(mean: Tensor, down: Tensor, kept: Tensor, new_down: Tensor) -> Tensor:
    """Equation 2. mean (width,), down (hidden, width), kept (kept,) int64, new_down (hidden, kept) -> (hidden,)."""
    mean = mean.to(down)
    return down @ mean - new_down @ mean[kept]


class FLAP(PruneMethod, frozen=True):
    """Fluctuation of activations, with an output bias."""

    allocation: Allocation = "global"
    """Distribution of the sparsity over blocks: cfsp (block importance), uniform, or global (one threshold for all channels)."""
    bias: bool = True
    """Add the mean of the removed channels as an output bias, in families that have one (others report that they do not)."""

    def channel_scores(self, channels: Channels) -> Tensor:
        """Equation 1, (width,); only the weights if no token reached this network."""
        moments = channels.activations
        if moments is None or moments.tokens == 0:
            return channels.down.float().square().sum(dim=0)
        mean = moments.sum / moments.tokens
        return fluctuation((moments.squares / moments.tokens - mean.square()).clamp_min(0), channels.down)

    @property
    def adds_bias(self) -> bool:
        """Whether to add the bias of equation 2."""
        return self.bias
