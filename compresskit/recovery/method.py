"""What a selection is given and must return, and the settings of the recover stage. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from compresskit.machine.precision import Precision
from compresskit.recovery.data.encoding import Sample
from compresskit.stages import Method, Options

if TYPE_CHECKING:
    from torch import Tensor

Loss = Literal["response", "distill"]
Update = Literal["low-rank", "full"]
DEFAULT_LEARNING_RATES: dict[Update, float] = {"low-rank": 1e-3, "full": 2e-4}
"""Of full updates 1e-4 and 4e-4 won back less on SmolLM2-135M (docs/recover.md)."""

DEFAULT_DATA_WEIGHT = 0.5
"""Won back more than 0 and than 1 on three texts, two of them no instructions (docs/recover.md)."""


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


class RecoverOptions(Options):
    """The settings besides the selection: on which data, and how to fine-tune."""

    original: str
    """The model before compression: a folder, a Hub id or demo:smollm2-135m."""
    data: tuple[str, ...] = ()
    """Instruction data: a .jsonl, .json or .parquet file; may be repeated."""
    select_only: bool = False
    """Stop after the selection."""
    adapter_only: bool = False
    """Write a PEFT adapter alone, for the source as it is."""
    pool: Annotated[int, Field(ge=0)] = 0
    """Samples of the data to choose from, drawn by the seed; 0 takes all."""
    held_back: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of each data source that is never trained on, for the loss before and after."""
    self_samples: Annotated[int, Field(ge=0)] = 0
    """Texts sampled from the original model itself to train on beside the selection."""
    loss: Loss = "response"
    """response: the data's own answers; distill: the original's predictions at every token."""
    data_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """With distill: share of the data's own next token in what is learned at a token, beside the predictions; left out, 0.5."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Times that the training samples are seen."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps, whatever the epochs; 0 goes by them."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Samples of an optimiser step."""
    update: Update = "low-rank"
    """low-rank: a pair beside every linear of the blocks; full: every weight of the blocks, of a dense source."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Mean rank of the low-rank updates; blocks share it by their importances, where pruning measured them."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak of the cosine schedule; left out, 1e-3 for low-rank updates, 2e-4 for full ones."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 20
    """Steps after which the training is saved for --resume."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    precision: Precision = "auto"
    """Of the matrix products in selection and training: bfloat16 where the device multiplies it faster."""
