"""AWQ: scale the inputs of linears so that important channels round better, and fold the factors into what makes the inputs.

AWQ, arXiv 2306.00978, equations 4 and 5:

    Q(W diag(s)) (diag(s)^-1 x),    s = s_X^alpha,    alpha = argmin of the output error                      (4, 5)

symbol  meaning                                                 shape         name here
W       a linear; those that share an input share s             (out, in)     weight
x       its input                                               (in,)         in second moments H = sum x x^T
s_X     mean magnitude of each input channel                    (in,)         magnitudes
s       factors, over sqrt(max s min s)                         (in,)         factors
alpha   exponent, one of 20 from 0 to 0.95                      ()            exponent

The error is tr(D H D^T) with D = Q(W diag(s)) diag(s)^-1 - W, rounded to nearest; no method of ours is run twenty times. The
division by s is folded into the norm before the linears, or into the rows of the linear before them (`up` before `down`, `v`
before `o`). What can be folded is found by what it does (folds.py), so a family whose norm adds 1 to its weight, whose attention
shares keys, or whose activation keeps factors needs no entry anywhere, and an input that something else reads too is left alone.

Differs from the paper: the error is that of the linears, which second moments give without another run of the block; the factors
of a norm are those that its weight holds in its stored dtype; readers of `v` with shared heads are scaled too, by the mean over
the heads that share; weights are not clipped. An exponent with which something overflows in its stored dtype is no candidate.
Linears of experts are left alone: a trial tells nothing of those that no token reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.models.model import Model
from compresskit.models.scalings import recorded
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.folds import Fold, exact_factors, find_folds, fold_into, is_in_range
from compresskit.walk.block import Block
from compresskit.walk.sequence import chosen_sequence
from compresskit.walk.statistics import Gram

EXPONENTS = tuple(step / 20 for step in range(20))
SMALLEST = 1e-4
"""Least power of a magnitude, as in the released code."""

Nearest = Callable[[Tensor, Scheme, torch.dtype], Tensor]
"""Function from a weight (out, in), its grid and the dtype of its scales to the weight rounded to nearest, float32."""


class Inputs(Gram):
    """Second moments, and the sum of magnitudes of every feature, (features,) float64."""

    def __init__(self, features: int, device: torch.device | str = "cpu"):
        super().__init__(features, device)
        self.magnitudes = torch.zeros_like(self.sum)

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, features)."""
        super().add(x)
        self.magnitudes += x.float().abs().sum(dim=0)

    def share(self) -> None:
        """Make the sums those of all ranks."""
        super().share()
        distributed.total(self.magnitudes)


class Scaler:
    """Scales block after block."""

    def __init__(self, model: Model, schemes: Mapping[str, Scheme | None], scale_dtype: torch.dtype, nearest: Nearest):
        """`schemes`: the grids of the linears by plain name, whose scales are stored in `scale_dtype`."""
        self.model, self.schemes, self.scale_dtype, self.nearest = model, schemes, scale_dtype, nearest
        self.known: list[Fold] = []
        """Of the block before, with the readers' names inside the block."""

    def __call__(self, block: Block) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Scale a block's linears in place, wherever the division can be folded.

        Returns:
            (the changed norms and biases by stored name, in their stored dtypes; {"scaling": by the first linear of every group
            into what its factors are folded, None where there is no fold, the exponent and the error relative to that of 0}).
        """
        short = f"{block.name}."
        sequence = self._sequence(block)
        folds = find_folds(block, sequence, True, [fold.renamed(short.__add__) for fold in self.known])
        self.known = [fold.renamed(lambda name: name.removeprefix(short)) for fold in folds]
        linears = [block.linear(fold.readers[0]) for fold in folds]
        inputs = {f.readers[0]: Inputs(each.in_features, each.weight.device) for f, each in zip(folds, linears, strict=True)}
        block.collect(inputs)
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {group[0].removeprefix(short): {"into": None} for each in sequence for group in each}
        for fold in folds:
            exponent, factors, error = self.best_factors(block, fold, inputs.pop(fold.readers[0]))
            fact: dict[str, Any] = {"into": fold.writer, "exponent": exponent, "error": error}
            if exponent:
                tensors |= fold_into(self.model, block, fold, factors)
                fact |= recorded([name.removeprefix(short) for name in fold.readers], fold.shared, factors)
            facts[fold.readers[0].removeprefix(short)] = fact
        return tensors, {"scaling": facts}

    def _sequence(self, block: Block) -> list[list[tuple[str, ...]]]:
        """The linears that may be scaled, without experts."""
        networks = [group.members for group in self.model.ffn_groups(block.index) if len(group.members) > 1]
        experts = {name for members in networks for ffn in members for name in (*ffn.in_projections, ffn.out_projection)}
        chosen = chosen_sequence(self.model, block.index, self.schemes)
        return [[group for group in position if experts.isdisjoint(group)] for position in chosen]

    def best_factors(self, block: Block, fold: Fold, inputs: Inputs) -> tuple[float, Tensor, float]:
        """Equation 5; ranks deal out the exponents.

        Returns:
            (alpha, factors of the writer's outputs (out,), error relative to that of alpha 0), the same on all ranks.
        """
        magnitudes, moments = fold.gathered(inputs.magnitudes.float() / max(1, inputs.tokens)), inputs.matrix()
        found: dict[float, float] = {}
        for place in distributed.own(len(EXPONENTS)):
            factors = exact_factors(self.model, block, fold, factors_of(magnitudes, EXPONENTS[place]))
            if place == 0 or self._in_range(block, fold, factors):
                found[EXPONENTS[place]] = self._error(block, fold, fold.spread(factors), moments)
        errors = {exponent: error for each in distributed.every(found) for exponent, error in each.items()}
        exponent = least(errors)
        factors = distributed.from_first(lambda: exact_factors(self.model, block, fold, factors_of(magnitudes, exponent)).cpu())
        return exponent, factors.to(magnitudes.device), errors[exponent] / errors[0.0] if errors[0.0] else 1.0

    def _in_range(self, block: Block, fold: Fold, factors: Tensor) -> bool:
        # Of the writer's own grid only the number of steps counts; a norm has none.
        scheme = self.schemes.get(f"{block.name}.{fold.writer}")
        return is_in_range(self.model, block, fold, factors, (self.scale_dtype, scheme.steps if scheme else 1))

    def _error(self, block: Block, fold: Fold, spread: Tensor, moments: Tensor) -> float:
        """Of all readers with the factors of their inputs, (in,)."""
        total = 0.0
        for name in fold.readers:
            weight, scheme = block.linear(name).weight.float(), self.schemes[name]
            assert scheme is not None
            total += output_error(weight, self.nearest(weight * spread, scheme, self.scale_dtype) / spread, moments)
        return total


def least(errors: Mapping[float, float]) -> float:
    """The smallest exponent of the least finite error; 0 where none is finite."""
    finite = [(error, exponent) for exponent, error in errors.items() if error < float("inf")]
    return min(finite)[1] if finite else 0.0


def factors_of(magnitudes: Tensor, exponent: float) -> Tensor:
    """s_X^alpha over sqrt(max min), of magnitudes (channels,) -> (channels,); 1 for channels that are always 0."""
    alive = magnitudes > 0
    if not bool(alive.any()):
        return torch.ones_like(magnitudes)
    powers = (magnitudes**exponent).clamp_min(SMALLEST)
    middle = (powers[alive].amax() * powers[alive].amin()).sqrt()
    return torch.where(alive, powers / middle, torch.ones_like(magnitudes))


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """tr(D H D^T), D = rounded - weight, both (out, in); moments (in, in)."""
    difference = rounded - weight
    return float(((difference @ moments) * difference).sum(dtype=torch.float64))
