"""Refuse to write a linear of which nothing is left: of the smallest weights no 16-bit scale makes a grid."""

from __future__ import annotations

from torch import Tensor

from compresskit.errors import NumericalError
from compresskit.numerics.packed import QuantizedLinear


def check_kept(name: str, weight: Tensor, stored: QuantizedLinear) -> None:
    """Compare a weight (out, in) with what is stored; raises NumericalError if all of it would round to 0."""
    largest = float(weight.abs().max())
    scale = stored.tensors.get("weight_scale")
    single = scale is not None and scale.is_floating_point() and "weight_global_scale" not in stored.tensors
    vanishes = single and scale is not None and 2 * largest < float(scale.float().min())  # the trained codes may still not be 0
    if largest > 0 and (vanishes or not bool(stored.weight.any())):
        raise NumericalError(
            f"{name}: all its weights would become 0; the largest, {largest:.2g}, is below half of the smallest 16-bit float. "
            f"Convert the checkpoint to bfloat16, or leave the linear out with --ignore {name}"
        )
