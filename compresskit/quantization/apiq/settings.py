"""ApiQ's hyperparameters: what the method (method.py) offers and its training (trainer.py) reads. Loads no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compresskit.machine.precision import Precision
from compresskit.quantization.method import BlockMethod


class ApiQSettings(BlockMethod):
    """The settings of ApiQ."""

    rank: Annotated[int, Field(ge=0)] | None = None
    """Rank of the adapter, 0 for none; left out, a sixty-fourth of the hidden size, at least 4 (0 for mixed and experts)."""
    adapter_bits: Annotated[int, Field(ge=8, le=16, multiple_of=8)] = 16
    """16, or 8: the adapter's factors in float8 e4m3, half the size; they are trained as they will be stored."""
    epochs: Annotated[int, Field(ge=0)] = 6
    """Passes over the calibration windows, block by block."""
    batch: Annotated[int, Field(ge=1)] = 2
    """Calibration windows in a step."""
    rounding: Literal["learned", "nearest"] = "learned"
    """Train an offset of up to half a step for each weight, or round to nearest."""
    start: Literal["gptq", "rtn"] = "gptq"
    """Starting point: GPTQ's rounding on the quantised prefix, or round to nearest."""
    error: Literal["capped", "absolute", "relative"] = "capped"
    """Output error of a token: over its state's mean square where that is above the median, as it is, or always over it."""
    saliency: Literal["none", "activation", "fisher"] = "none"
    """What tells how much each weight matters: nothing, its input's mean square, or the squared gradient of the loss."""
    saliency_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the saliency term, where the output error at the start counts 1."""
    regularize: Literal["before-lora", "after-lora"] = "before-lora"
    """Hold the quantised weight near the original without the adapter, or with it."""
    rounding_rate: Annotated[float, Field(gt=0)] = 1.0
    """How far an offset can travel in all, in half steps."""
    clipping_rate: Annotated[float, Field(gt=0)] = 2.0
    """How far a clipping parameter can travel in all."""
    norm_rate: Annotated[float, Field(ge=0)] = 1.0
    """How far the block's norms and biases can travel in all, in their root mean square; 0 keeps them."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """AdamW's rate for the adapter."""
    precision: Precision = "auto"
    """Of the matrix products in training: bfloat16 where the device multiplies it faster."""
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Share of the mean second moment that is added to all of them, at the start."""
