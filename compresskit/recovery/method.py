"""Interface of selection methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from compresskit.recovery.data.encoding import Sample
from compresskit.stages import Method

if TYPE_CHECKING:
    from torch import Tensor


class Choice(NamedTuple):
    """A selected sample and the reason."""

    sample: int
    """Position in the pool."""
    reason: str
    cluster: int | None = None
    divergence: float | None = None
    cost: float | None = None
    score: float | None = None
    lost_loss: float | None = None


@dataclass(frozen=True)
class Selection:
    """The selected samples of the pool, in order."""

    choices: list[Choice]
    facts: dict[str, Any] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    """Cluster of every sample in the pool, if the method made clusters from vectors."""


class Lost(NamedTuple):
    """The compressed model's degradation on each sample (degradation.py)."""

    divergences: list[float]
    """Divergence of its predictions from the original's, in nats, 0 to ln 2."""
    losses: list[float]
    """Increase of the response's loss, in nats per token."""


@dataclass(frozen=True)
class Pool:
    """The samples to choose from; values that need model passes are computed on demand."""

    samples: Sequence[Sample]
    seed: int
    embeddings: Callable[[str], Tensor]
    """(samples, width), from the compressed model itself or from the encoder in this folder."""
    lost: Callable[[], Lost]
    """The compressed model's degradation on each sample, from one pass of both models."""
    target: Callable[[], list[str]]
    """Texts of the target distribution."""


class SelectionMethod(Method):
    """Select samples from the pool."""

    passes: ClassVar[float] = 0.0
    """Number of forward passes over the pool that the method needs.

    `lost` takes one pass of each model, `embeddings` one of the compressed model; together they share that pass.
    """

    chooses: ClassVar[bool] = True
    """Whether there must be samples to choose from; a method that does not look at them leaves plain text alone to train on."""

    def select(self, pool: Pool) -> Selection:
        """Select samples; the same pool and seed give the same selection."""
        raise TypeError(f"{type(self).__name__} defines no select")


class BudgetMethod(SelectionMethod):
    """Select a share of the pool."""

    budget: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the samples to select."""

    def count(self, pool: Pool) -> int:
        """Number of samples in the budget, at least one."""
        return max(1, round(self.budget * len(pool.samples)))
