"""The settings of `recover` besides those of the selection."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compresskit.machine.precision import Precision
from compresskit.stages import Options

Loss = Literal["response", "distill"]
Update = Literal["low-rank", "full", "grid"]
Train = Literal["scales", "all"]


class RecoverOptions(Options):
    """The settings besides the selection: on which data, and how to fine-tune."""

    original: str
    """The model before compression: a folder, a Hub id or demo:smollm2-135m."""
    data: tuple[str, ...] = ()
    """Instruction data: a .jsonl, .json or .parquet file; may be repeated. `full` and `random` do without, on the texts of
    --self-samples and --text-samples alone."""
    select_only: bool = False
    """Stop after the selection."""
    show: Annotated[int, Field(ge=0)] = 0
    """Print the exact text of the first N selected samples, as the model sees it, and mark what of it is the response."""
    adapter_only: bool = False
    """Write only a PEFT adapter, for the unchanged source."""
    pool: Annotated[int, Field(ge=0)] = 0
    """Number of samples to choose from, drawn by the seed; 0 takes all."""
    held_back: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of each data source, or of the texts without data, held back to measure the loss before and after."""
    self_samples: Annotated[int, Field(ge=0)] = 0
    """Number of texts sampled from the original model as additional training data."""
    text_samples: Annotated[int, Field(ge=0)] = 0
    """Number of windows of the calibration text as additional training data."""
    loss: Loss | None = None
    """Training loss: response (the data's own answers) or distill (the original's predictions at every token); default:
    response, and distill with --update grid."""
    data_weight: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the data's own next token relative to the predictions, with distill; default: 0.5."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training samples."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Number of optimiser steps; 0 derives it from the epochs."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Samples per optimiser step."""
    update: Update = "low-rank"
    """Trained weights: low-rank (a pair per linear), full (every weight of the blocks, dense sources only) or grid (codes, scales
    and norms of a low-bit source, which keeps its size and format)."""
    train: Train = "scales"
    """What --update grid trains: scales (with norms and biases; codes stay), or all (codes too)."""
    blocks_at_once: Annotated[int, Field(ge=0)] = 0
    """Consecutive blocks that --update grid trains together, on the original's hidden states, for models that do not fit into
    memory; 0 trains the whole network."""
    rank: Annotated[int, Field(ge=1)] = 16
    """Mean rank of the low-rank updates, distributed by block importance if pruning measured it."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate of the cosine schedule; default: 1e-3 for low-rank, 2e-3 for grid, 2e-4 for full."""
    code_distance: Annotated[float, Field(gt=0)] = 0.5
    """Total distance that the weight behind a code can move with --update grid, in steps of the grid."""
    checkpoint_steps: Annotated[int, Field(ge=1)] = 20
    """Steps between training checkpoints for --resume."""
    gradient_checkpointing: bool = False
    """Recompute activations to save memory."""
    precision: Precision = "auto"
    """Precision of the matrix products in selection and training; auto uses bfloat16 if the device multiplies it faster."""

    @property
    def learned(self) -> Loss:
        """The training loss: as asked for, or the default."""
        return self.loss or ("distill" if self.update == "grid" else "response")
