"""Fold what removed blocks added into the last linear before them: equation 4 of method.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compresskit import distributed
from compresskit.pruning.refit import refit
from compresskit.walk.block import Block
from compresskit.walk.hooks import recorded_inputs
from compresskit.walk.sequence import replace_weight
from compresskit.walk.statistics import Gram

MOST_CURVED = 0.1
"""Largest part of an output's change that may not be proportional to the change of the linear's own output: rounding of 16-bit
activations stays far below it, a norm after the linear far above."""

DIGITS = 4
"""Of the number by which a block multiplies a linear's output."""


class Folded(NamedTuple):
    """A refitted linear."""

    weight: Tensor
    """W', (hidden, width) float32."""
    error_before: float
    """||h_q - h'_p+1||^2 over ||h_q - h'_p+1 + s W a||^2, on the calibration text: 1 if the linear gave nothing."""
    error_after: float
    """The same with W'."""


def scale_of(block: Block, linear: nn.Linear) -> float | None:
    """Find by what the block multiplies the linear's output on the way to its own.

    Seen on one micro-batch of the first rank: each row of the linear's weight gets its neighbour's added.

    Returns:
        The number; None if it is no multiplication by one, because a norm or a gate follows.
    """
    return distributed.from_first(lambda: _scale(block, linear))


def _scale(block: Block, linear: nn.Linear) -> float | None:
    old = linear.weight
    seen: list[Tensor] = []
    with recorded_inputs(linear, seen.append, stop=False):
        before = block.run(block.hidden[0], 0)
    if len(seen) != 1:
        return None
    change = old.roll(1, 0)
    try:
        replace_weight(linear, old + change)
        after = block.run(block.hidden[0], 0)
    finally:
        linear.weight = old
    moved = (after.double() - before.double()).flatten(0, -2)
    own = (seen[0].float() @ change.float().T).double()
    if moved.shape != own.shape or not float(own.square().sum()):
        return None
    # Sums over a matrix differ in their last bits with the number of threads, which no weight may.
    scale = float(f"{float((moved * own).sum() / own.square().sum()):.{DIGITS}g}")
    rest = float((moved - scale * own).norm() / moved.norm().clamp_min(1e-30))
    return scale if scale and rest < MOST_CURVED else None


def fold(block: Block, linear: nn.Linear, scale: float, targets: Sequence[Tensor], ridge: float) -> Folded:
    """Refit the linear so that the block's outputs come near `targets`, by micro-batch in the shape of its inputs.

    What is missing counts as further channels of the linear, of weight 1, that are removed: then equation 4 is the refit of
    removed channels (refit.py).

    Returns:
        The weight, and the errors before and after.
    """
    weight = linear.weight.float()
    hidden, width = weight.shape
    gram = Gram(width + hidden, weight.device)
    for number, given in enumerate(block.hidden):
        seen: list[Tensor] = []
        with recorded_inputs(linear, seen.append, stop=False):
            output = block.run(given, number)
        missing = (targets[number].to(output).float() - output.float()).flatten(0, -2) / scale
        gram.add(torch.cat([seen[0].float(), missing], dim=1))
    gram.share()
    moments = gram.matrix()
    channels = torch.arange(width + hidden, device=weight.device)
    diagonal = moments.diagonal().double()
    share = ridge * float(diagonal[:width].mean() / diagonal.mean().clamp_min(1e-300))  # `refit` takes the mean over both
    both = torch.cat([weight, torch.eye(hidden, device=weight.device)], dim=1)
    found = refit(both, moments, channels[:width], channels[width:], share)
    before = float(diagonal[width:].sum())
    energy = max(found.energy, torch.finfo(torch.float32).tiny)
    return Folded(found.weight, before / energy, found.error / energy)
