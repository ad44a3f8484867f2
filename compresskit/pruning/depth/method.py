"""Depth: remove whole blocks, and let the last linear before each gap make up for them.

Which blocks (choice.py), the least of, over calibration text,

    angle  d(h_i, h_i+1)        a block's own                 ShortGPT, arXiv 2403.03853, section 3.1               (1)
    run    d(h_i, h_i+n)        n blocks that follow on       arXiv 2403.17887, equation 3; ReplaceMe, 2505.02819   (2)
    loss   KL(original || without R and i)                    one at a time, R those that are gone                  (3)

    d(a, b) = arccos(a . b / (||a|| ||b||)) / pi, the mean over tokens

What the blocks of a gap added (fold.py), from the block p before it to the block q after it:

    W' = argmin ||h_q - (h'_p+1 + s (W' - W) a)||^2 + eps ||W' - W||^2 = W + C_ra (C_aa + eps I)^-1                 (4)

symbol   meaning                                                                shape             name here
h_i      hidden states that the original's block i gets                         (tokens, hidden)  target
h'_p+1   what block p gives in the pruned model, with the old W                 (tokens, hidden)
W, a     last linear of block p (its down projection), and its inputs there     (hidden, width)   down, inputs
s        by what the block multiplies that linear's output                                        scale
r        (h_q - h'_p+1) / s                                                     (tokens, hidden)  missing
C_xy     second moments over the calibration text
eps      ridge * mean(diag C_aa)

Differs from the papers: (1) ShortGPT takes 1 - cosine, (2) takes the last token of each text alone; here both are the mean
angle over all tokens. (4) ReplaceMe fits T (hidden, hidden) with W' = T^T W, on the original's activations; every such W' is
among those of (4), which sees the activations of the pruned prefix and is held towards the old weights.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compresskit.stages import Method


class Depth(Method, frozen=True):
    """Remove whole blocks."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the blocks to remove; rounded to whole blocks."""
    blocks: Annotated[int | None, Field(ge=1)] = None
    """Number of blocks to remove, in place of a share."""
    choose: Literal["run", "loss", "angle"] = "run"
    """Which blocks: the run that turns the hidden states least (run), greedily by the whole model's KL divergence (loss), or
    those that each turn them least (angle)."""
    candidates: Annotated[int, Field(ge=0)] = 8
    """With --choose loss, blocks that are tried after the first round: those that cost least when last tried; 0 tries all."""
    refit: Literal["all", "gaps", "none"] = "all"
    """Last linears of blocks to refit to the original's hidden states by least squares: before each gap (gaps), also of all
    blocks after the first gap (all), or none."""
    ridge: Annotated[float, Field(gt=0)] = 0.05
    """Weight of staying near the old weights in the refit, as a share of the inputs' mean second moment."""

    def removed_of(self, count: int) -> int:
        """How many of `count` blocks to remove."""
        return self.blocks if self.blocks is not None else round(self.sparsity * count)
