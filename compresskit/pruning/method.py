"""Interface of pruning methods: one score per channel."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from compresskit.models.layouts import Layout
from compresskit.stages import Method

if TYPE_CHECKING:
    from torch import Tensor

    from compresskit.pruning.channels import Channels

Allocation = Literal["cfsp", "uniform", "global"]
LARGEST_STEP = 128
"""Widths in multiples of 128 fill the tiles of tensor cores (CFSP, section 4.1)."""
FEWEST_STEPS = 32
"""The default rounding step leaves at least this many widths to choose from."""


class PruneMethod(Method):
    """Remove channels of the feed-forward networks.

    A method gives one score per channel. The shared walk (walk.py) allocates widths to blocks, keeps the best channels of
    each block, refits the output projection and writes the result.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of the FFN channels to remove."""
    allocation: Allocation = "uniform"
    """Distribution of the sparsity over blocks: cfsp (block importance), uniform, or global (one threshold for all channels)."""
    round_to: Annotated[int, Field(ge=0)] = 0
    """Round widths to multiples of this; 0 picks 128, or less for small FFNs."""
    refit: bool = True
    """Refit the output projection to the calibration outputs by least squares."""
    layout: Layout = "ragged"
    """Storage of widths that differ between blocks: ragged (real widths) or padded (zeros up to the largest)."""

    needs_activations: ClassVar[bool] = True
    """Whether the scores need calibration text (without a refit)."""
    needs_covariance: ClassVar[bool] = False
    """Whether the scores need the full second moments, not only each channel's."""

    @property
    def adds_bias(self) -> bool:
        """Whether the method corrects the output bias in families that have one."""
        return False

    def channel_scores(self, channels: Channels) -> Tensor:
        """Importance of every channel of one feed-forward network, (width,); larger is more important."""
        raise TypeError(f"{type(self).__name__} defines no channel_scores")

    def widths_step(self, widest: int) -> int:
        """Rounding step for a model with this widest FFN."""
        return self.round_to or default_step(widest)


def default_step(widest: int) -> int:
    """Largest power of two up to 128 that leaves at least 32 widths to choose from."""
    largest = max(1, widest // FEWEST_STEPS)
    return min(LARGEST_STEP, 1 << int(math.log2(largest)))
