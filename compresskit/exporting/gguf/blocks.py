"""Types of GGUF tensors, and blocks of 32 weights with one scale in half precision.

    W[i] = d q[i]                                                                                    (1)

type   q             block
Q4_0   -8 to 7       d (f16), 16 bytes: byte j holds q[j] + 8 in its low half, q[j + 16] + 8 in its high half
Q5_0   -16 to 15     d, 4 bytes with the fifth bits of q + 16, low half first, 16 bytes with the other four as in Q4_0
Q8_0   -128 to 127   d, 32 signed bytes

Linears whose codes fit such a block are carried as they are; only scales that half precision cannot hold are rounded. Layouts:
ggml-quants.c of llama.cpp. Rounding of dense weights is the gguf package's, which gives the bytes of llama.cpp.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
BLOCK = 32
"""Weights per block."""
HALF = 16
STEPS = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
"""The least and largest q, smallest type first."""


def holding(lowest: int, highest: int) -> str | None:
    """The smallest type whose blocks hold whole numbers in this range; None if there is none."""
    return next((kind for kind, (least, most) in STEPS.items() if least <= lowest and highest <= most), None)


def packed(kind: str, steps: NDArray[np.integer], scales: NDArray[np.float16]) -> Bytes:
    """Blocks of equation 1. steps (rows, columns) in the type's range, scales (rows, columns / 32) -> (rows, bytes)."""
    rows = len(steps)
    blocks = steps.astype(np.int16).reshape(rows, -1, BLOCK)
    parts: list[NDArray[np.uint8]] = [np.ascontiguousarray(scales, np.float16).view(np.uint8).reshape(*blocks.shape[:2], 2)]
    if kind == "Q8_0":
        parts.append(blocks.astype(np.int8).view(np.uint8))
    else:
        shifted = (blocks - STEPS[kind][0]).astype(np.uint8)
        if kind == "Q5_0":
            parts.append(np.packbits(shifted >> 4, axis=-1, bitorder="little"))
        low = shifted & np.uint8(15)
        parts.append(np.bitwise_or(low[..., :HALF], low[..., HALF:] << np.uint8(4), dtype=np.uint8))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def fitting(kind: str, columns: int) -> str:
    """The type itself, or F16 where rows of so many columns are no whole blocks."""
    return "F16" if kind in STEPS and columns % BLOCK else kind


def rounded(kind: str, weight: Floats) -> NDArray[np.generic]:
    """A dense tensor in this type: an array of its dtype, or (rows, bytes) uint8."""
    if kind in ("F32", "F16"):
        with np.errstate(over="ignore"):  # infinity is the caller's to find
            return weight.astype(np.float32 if kind == "F32" else np.float16)
    from gguf import GGMLQuantizationType, quants

    found: NDArray[np.generic] = quants.quantize(weight, GGMLQuantizationType[kind])
    return found


def restored(kind: str, stored: NDArray[np.generic]) -> Floats:
    """The float32 values that readers make of a stored tensor."""
    if kind in ("F32", "F16"):
        return stored.astype(np.float32)
    from gguf import GGMLQuantizationType, quants

    found: Floats = quants.dequantize(stored, GGMLQuantizationType[kind])
    return found


def stored_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor (rows, columns) in this type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(math.prod(shape) // block * size)


def relative_error(found: Floats, wanted: Floats) -> float:
    """||found - wanted|| / ||wanted||, Frobenius norms; 0 for equal tensors."""
    difference = float(np.linalg.norm((found - wanted).ravel().astype(np.float64)))
    return difference / float(np.linalg.norm(wanted.ravel().astype(np.float64))) if difference else 0.0


def scale_error(steps: NDArray[np.integer], found: Floats, wanted: Floats) -> float:
    """`relative_error` of W = d q by the groups' scales alone. steps (rows, columns), found and wanted (rows, groups)."""
    if np.array_equal(found, wanted):
        return 0.0
    squares = np.square(steps.astype(np.float64)).reshape(*found.shape, -1).sum(axis=-1)
    whole = float((squares * np.square(wanted.astype(np.float64))).sum())
    return math.sqrt(float((squares * np.square(found.astype(np.float64) - wanted)).sum()) / whole) if whole else 0.0
