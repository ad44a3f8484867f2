"""GGUF files as stock tools read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.stock import quiet


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors as the gguf package dequantises them, (out, in) float32."""
    return {each.name: torch.from_numpy(dequantize(each.data, each.tensor_type).copy()) for each in GGUFReader(path).tensors}


def kinds_of(path: Path) -> dict[str, str]:
    """Types of the tensors by name."""
    return {each.name: each.tensor_type.name for each in GGUFReader(path).tensors}


def keys_of(path: Path) -> dict[str, Any]:
    """The keys of a file."""
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def stock_logits(path: Path, tokens: Tensor) -> Tensor:
    """Logits of a file in stock transformers, which reads some architectures."""
    with quiet():
        network = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        logits: Tensor = network.eval()(tokens).logits
    return logits
