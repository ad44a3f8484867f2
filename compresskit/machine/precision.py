"""Names of dtypes, and the precision of matrix products in training."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""`auto` is bfloat16 if the device multiplies it faster, otherwise float32."""


TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""torch's dtype names by safetensors' names."""
SAFETENSORS_NAMES = {name: key for key, name in TORCH_NAMES.items()}


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has bfloat16 matrix instructions rather than an emulation."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return False


def takes_bfloat16(device: torch.device, precision: Precision) -> bool:
    """Whether to use bfloat16 for matrix products."""
    return precision == "bfloat16" or (precision == "auto" and multiplies_bfloat16(device))


def matrix_products(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """A context that sets the precision of matrix products; sums, norms and the residual stream keep theirs."""
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=takes_bfloat16(device, precision))


def torch_dtype(name: str) -> torch.dtype:
    """Convert a safetensors dtype name such as "BF16" to torch's dtype."""
    import torch

    found: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return found
