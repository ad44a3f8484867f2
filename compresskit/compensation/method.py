"""Interface of compensation methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from compresskit.errors import RequestError
from compresskit.models.model import Model
from compresskit.stages import Method

if TYPE_CHECKING:
    import torch

    from compresskit.numerics.lowrank import Metric
    from compresskit.walk.hooks import Statistic

Aim = Literal["weight", "block", "output"]
"""Target of the repair: weights, or outputs of a block or of the whole original (residuals.py)."""
HIDDEN_PER_RANK = 64
SMALLEST_RANK = 4
OUTPUT_WEIGHT_WINDOWS = 32
"""Calibration windows used to compute the output weights."""


class CompensateMethod(Method):
    """Add a low-rank pair to every linear to repair the compression error.

    A method defines the measure of weight errors. The shared walk (walk.py) finds the best pair for that measure, on the inputs
    given by the repaired prefix.
    """

    rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of every pair; default: 1/64 of the hidden size, at least 4."""
    rank_budget: Annotated[float, Field(gt=0)] | None = None
    """Parameters of all pairs as a share of the repaired weights, distributed where they help most; replaces a fixed rank."""
    round_rank: Annotated[int, Field(ge=1)] = 1
    """Round ranks to multiples of this, under a budget."""
    adapter_bits: Annotated[int, Field(ge=8, le=16, multiple_of=8)] = 16
    """Bits of the factors: 16, or 8 for float8 e4m3, half the size."""
    aim: Literal["auto", "weight", "block", "output"] = "auto"
    """Target of the repair: weight, block (outputs of the original's block on the same inputs), output (outputs of the whole
    original), or auto: block where channels are missing or apiq trained it, else weight."""
    output_weights: Literal["auto", "none", "fisher"] = "auto"
    """Output error weights: none, fisher (effect on the original's predictions; a backward pass), auto (fisher if budgeted)."""
    ignore: tuple[str, ...] = ()
    """Skip linears whose names contain this text, such as down or layers.0; may be repeated."""

    needs_activations: ClassVar[bool] = True
    """Whether the measure needs calibration text."""
    splits: ClassVar[bool] = False
    """Whether the pair is split off the weight, as a starting point for fine-tuning, instead of added to it."""

    @model_validator(mode="after")
    def _one_size(self) -> CompensateMethod:
        if self.rank is not None and self.rank_budget is not None:
            raise RequestError(f"--rank {self.rank} and --rank-budget {self.rank_budget:g}: pass one of them")
        return self

    def uniform_rank(self, model: Model) -> int:
        """The requested rank, or a share of the hidden size."""
        return self.rank or max(SMALLEST_RANK, model.hidden_size // HIDDEN_PER_RANK)

    def budget(self, model: Model, names: Sequence[str]) -> int:
        """Total parameters of all pairs under a budget."""
        assert self.rank_budget is not None
        return int(self.rank_budget * sum(math.prod(model.linear_shape(name)) for name in names))

    def check_ranks(self, model: Model, names: Sequence[str]) -> None:
        """Raise RequestError if the rank exceeds a linear, or the budget is less than one pair."""
        smallest = min(names, key=lambda name: min(model.linear_shape(name)))
        limit, rank = min(model.linear_shape(smallest)), self.uniform_rank(model)
        if self.rank_budget is None and rank > limit:
            raise RequestError(
                f"--rank {rank}: exceeds {limit}, the smaller side of {smallest}; lower it, or --ignore that linear"
            )
        cheapest = min(sum(model.linear_shape(name)) for name in names) * self.round_rank
        if self.rank_budget is not None and self.budget(model, names) < cheapest:
            found = f"{self.budget(model, names)} parameters are less than one pair of {cheapest}"
            raise RequestError(f"--rank-budget {self.rank_budget:g}: {found}; raise it")

    @property
    def weighs_outputs(self) -> bool:
        """Whether outputs are weighted by the effect of their errors on the original's predictions."""
        asked = self.output_weights == "fisher" or (self.output_weights == "auto" and self.rank_budget is not None)
        return asked and not self.splits

    def chosen_aim(self, by_block: bool) -> Aim:
        """The resolved aim; `by_block`: whether the source's blocks were fitted to outputs as a whole, not to weights."""
        if self.splits:
            return "weight"
        if self.aim == "auto":
            return "block" if by_block else "weight"
        return self.aim

    @property
    def smallest(self) -> bool:
        """Whether the pair takes the least important directions."""
        return False

    def statistic(self, features: int, device: torch.device) -> Statistic:
        """Create an empty statistic of the inputs of a linear."""
        raise TypeError(f"{type(self).__name__} defines no statistic")

    def metric(self, statistic: Statistic | None, features: int, device: torch.device) -> Metric:
        """The measure for linears with these inputs, (features, features); `statistic` is None without calibration text."""
        raise TypeError(f"{type(self).__name__} defines no metric")


class SecondMomentsMethod(CompensateMethod):
    """A method whose measure is the full second moments of the inputs."""

    damping: Annotated[float, Field(gt=0)] = 0.01
    """Damping of the second moments, as a share of their mean."""

    def statistic(self, features: int, device: torch.device) -> Statistic:
        """Full second moments."""
        from compresskit.walk.statistics import Gram

        return Gram(features, device)

    def moments(self, statistic: Statistic | None, features: int, device: torch.device, shrinkage: float = 0.0) -> Metric:
        """X^T X / tokens, (features, features), damped; the identity for an expert that no token reached."""
        import torch

        from compresskit.numerics.lowrank import Metric
        from compresskit.walk.statistics import Gram

        assert isinstance(statistic, Gram)
        if not statistic.tokens:
            return Metric(torch.eye(features, device=device))
        return Metric(statistic.matrix() / statistic.tokens, self.damping, shrinkage)
