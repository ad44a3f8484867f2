"""What a selection is given and must return. Loads no torch."""

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
    """A sample that was taken, and why."""

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
    """What was taken of the pool, in order."""

    choices: list[Choice]
    facts: dict[str, Any] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    """The cluster of every sample of the pool, where the method made any from vectors."""


class Lost(NamedTuple):
    """What the compressed model lost on each sample (degradation.py)."""

    divergences: list[float]
    """How far its predictions are from the original's, in nats, 0 to ln 2."""
    losses: list[float]
    """By how much the response's loss grew, in nats a token."""


@dataclass(frozen=True)
class Pool:
    """The samples to choose from; what costs passes of a model is computed when it is asked for."""

    samples: Sequence[Sample]
    seed: int
    embeddings: Callable[[str], Tensor]
    """(samples, width), by the compressed model itself or by the encoder in this folder."""
    lost: Callable[[], Lost]
    """What the compressed model lost on them, by one pass of both models."""
    target: Callable[[], list[str]]
    """Texts of the distribution that is to be recovered."""


class SelectionMethod(Method):
    """Choose samples of the pool."""

    passes: ClassVar[float] = 0.0
    """Forward passes over the pool that it asks for.

    `lost` takes one of each model, `embeddings` one of the compressed model, the same one where both are asked for.
    """

    def select(self, pool: Pool) -> Selection:
        """The choice; the same for the same pool and seed."""
        raise TypeError(f"{type(self).__name__} defines no select")


class BudgetMethod(SelectionMethod):
    """Choose a share of the pool."""

    budget: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of the samples that is taken."""

    def count(self, pool: Pool) -> int:
        """How many samples the budget is, at least one."""
        return max(1, round(self.budget * len(pool.samples)))
