"""Hyperparameters of ApiQ, shared by method.py and trainer.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compresskit.machine.precision import Precision
from compresskit.quantization.block_method import BlockMethod


class ApiQSettings(BlockMethod):
    """The settings of ApiQ."""

    rank: Annotated[int, Field(ge=0)] | None = None
    """Rank of the adapter, 0 for none; default: 1/64 of the hidden size, at least 4 (0 for mixed precision and experts)."""
    adapter_bits: Annotated[int, Field(ge=8, le=16, multiple_of=8)] = 16
    """Bits of the adapter's factors: 16, or 8 for float8 e4m3, half the size; they are trained in their stored precision."""
    epochs: Annotated[int, Field(ge=0)] = 6
    """Passes over the calibration windows, per block."""
    batch: Annotated[int, Field(ge=1)] = 2
    """Calibration windows per step."""
    rounding: Literal["learned", "nearest"] = "learned"
    """Rounding: learned (train an offset of up to half a step for each weight) or nearest."""
    start: Literal["gptq", "rtn"] = "gptq"
    """Starting point: gptq (GPTQ on the quantised prefix) or rtn (round to nearest)."""
    error: Literal["capped", "absolute", "relative"] = "capped"
    """Token error: divided by its state's mean square if above the median (capped), never (absolute) or always (relative)."""
    output_weights: Literal["none", "fisher"] = "fisher"
    """Weight of each channel of a block's output in its error: none, or fisher (the squared gradient of the loss)."""
    saliency: Literal["none", "activation", "fisher"] = "none"
    """Importance of each weight: none, activation (its input's mean square) or fisher (the squared gradient of the loss)."""
    saliency_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the saliency term, relative to the output error at the start."""
    regularize: Literal["before-lora", "after-lora"] = "before-lora"
    """Weight to keep near the original: before-lora (without the adapter) or after-lora (with it)."""
    rounding_rate: Annotated[float, Field(gt=0)] = 1.0
    """Total distance that a rounding offset can move, in half steps."""
    clipping_rate: Annotated[float, Field(gt=0)] = 2.0
    """Total distance that a clipping parameter can move."""
    norm_rate: Annotated[float, Field(ge=0)] = 1.0
    """Total distance that each value of the block's norms and biases can move, relative to its size; 0 freezes them."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Learning rate of AdamW for the adapter."""
    precision: Precision = "auto"
    """Precision of the matrix products in training; auto uses bfloat16 if the device multiplies it faster."""
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Damping of the second moments at the start, as a share of their mean."""
