"""SmoothQuant: move the spread of activation channels into the weights, through the norm before them.

SmoothQuant, arXiv 2211.10438, equation 4: norm weights are divided and the columns of the linears behind it multiplied by

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)                                                     (4)

symbol  meaning                                     shape         name here
X_j     channel j of the norm's output              (tokens,)     largest (in,): its largest magnitude
W_j     column j of the linears that read it        (out,)        weights
alpha   share of the spread that moves              ()            strength

Differs from the paper: s is rounded to powers of two, so that a norm in 16 bits holds the quotient exactly. A norm is found
by what it does (folds.py).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.models.model import Model
from compresskit.quantization.folds import exact_factors, find_folds, fold_into
from compresskit.walk.block import Block
from compresskit.walk.sequence import chosen_sequence


class ChannelMaxima:
    """Largest magnitude of every feature, (features,) float32."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (..., features)."""
        found = x.detach().float().abs().flatten(0, -2).amax(dim=0)
        self.value = found if self.value is None else torch.maximum(self.value, found)

    def share(self) -> None:
        """Make them those of all ranks."""
        found = [value for value in distributed.every(self.value) if value is not None]
        self.value = torch.stack([each.to(found[0].device) for each in found]).amax(dim=0) if found else None


def factors(largest: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """Equation 4 in powers of two. largest (in,), weights (out, in) each -> (in,); 1 for channels that are always 0."""
    columns = torch.stack([weight.float().abs().amax(dim=0) for weight in weights]).amax(dim=0)
    found = largest**strength / columns ** (1 - strength)
    rounded = torch.exp2(found.log2().round())
    return torch.where((largest > 0) & (columns > 0), rounded, torch.ones_like(rounded))


def smooth(model: Model, block: Block, chosen: Collection[str], strength: float) -> dict[str, Tensor]:
    """Smooth the inputs of a block's chosen linears in place, wherever a norm makes them and nothing else reads it.

    Returns:
        The changed parameters of norms by stored name, in their stored dtypes.
    """
    folds = find_folds(block, chosen_sequence(model, block.index, chosen), with_linears=False)
    maxima = {fold.readers[0]: ChannelMaxima() for fold in folds}
    block.collect(maxima)
    changed: dict[str, Tensor] = {}
    for fold in folds:
        largest = maxima[fold.readers[0]].value
        assert largest is not None
        weights = [block.linear(name).weight for name in fold.readers]
        held = exact_factors(model, block, fold, factors(largest, weights, strength))
        changed |= fold_into(model, block, fold, held)
    return changed
