"""bitsandbytes NF4: 4-bit linears on the quantiles of a normal distribution, readable by transformers and vLLM.

    NAME.weight                                 U8 (ceil(out * in / 2), 1)   two codes a byte, over the flattened (out, in)
    NAME.weight.absmax                          F32, or U8 where nested      largest magnitude of every block
    NAME.weight.quant_map                       F32 (16,)                    the codebook
    NAME.weight.nested_absmax, .nested_quant_map                             of the block maxima, where nested
    NAME.weight.quant_state.bitsandbytes__nf4   U8                           JSON: block size, dtype, shape

The library computes the codes. The JSON is padded with spaces to a fixed length, so the file layout is known beforehand.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

STATE = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
CODEBOOK = 16
INT8_STEPS = 127
NESTED_BLOCK = 256
"""Block maxima per second-level maximum; fixed by the library."""
LEAVES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", STATE)


def tensor_specs(name: str, shape: tuple[int, int], block_size: int, nested: bool) -> list[TensorSpec]:
    """Stored tensors of one linear (out, in); `name` without `.weight`, `block_size` in weights."""
    elements = shape[0] * shape[1]
    blocks = -(-elements // block_size)
    weight = f"{name}.weight"
    specs = [
        TensorSpec(weight, "U8", (-(-elements // 2), 1)),
        TensorSpec(f"{weight}.absmax", "U8" if nested else "F32", (blocks,)),
        TensorSpec(f"{weight}.quant_map", "F32", (CODEBOOK,)),
        TensorSpec(f"{weight}.{STATE}", "U8", (STATE_BYTES,)),
    ]
    if nested:
        specs.append(TensorSpec(f"{weight}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)))
        specs.append(TensorSpec(f"{weight}.nested_quant_map", "F32", (NESTED_BLOCK,)))
    return specs


def quantize(weight: Tensor, block_size: int, nested: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Return (stored tensors by leaf name, the weight that readers unpack, (out, in) float32) of a weight (out, in)."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.contiguous(), blocksize=block_size, compress_statistics=nested, quant_type="nf4")
    found = {"weight": codes}
    for leaf, value in state.as_dict(packed=True).items():
        if leaf == STATE:
            text = bytes(value.tolist()).ljust(STATE_BYTES)
            value = torch.tensor(list(text), dtype=torch.uint8)  # noqa: PLW2901
        found[f"weight.{leaf}"] = value
    return found, dequantize_4bit(codes, state).float()


def configuration(dtype: str, nested: bool, ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `dtype` is the dtype of the matrix products."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": dtype,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ignored,
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


@dataclass(frozen=True)
class Nf4:
    """The 4-bit linears of a checkpoint."""

    checkpoint: Checkpoint

    def holds(self, name: str) -> bool:
        """Whether this linear is stored in 4 bits."""
        return f"{name}.weight.{STATE}" in self.checkpoint.tensors

    def _state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(bytes(self.checkpoint.read_numbers(f"{name}.weight.{STATE}")).decode())
        return found

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in), read from the JSON beside the codes."""
        rows, columns = self._state(name)["shape"]
        return rows, columns

    def bits(self, name: str) -> int:
        """Bits per code."""
        return 4

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        names = (f"{name}.weight", *(f"{name}.weight.{leaf}" for leaf in LEAVES))
        return [each for each in names if each in self.checkpoint.tensors]

    def read(self, name: str) -> Tensor:
        """Read the weight, (out, in), in the dtype before quantisation."""
        import torch
        from bitsandbytes.functional import QuantState, dequantize_4bit

        stored = {each.removeprefix(f"{name}.weight."): self.checkpoint.read(each) for each in self.stored_tensors(name)}
        codes = stored.pop(f"{name}.weight")
        weight: Tensor = dequantize_4bit(codes, QuantState.from_dict(stored, device=torch.device("cpu")))
        return weight


@dataclass(frozen=True)
class Int8:
    """The 8-bit linears of a checkpoint: NAME.weight I8 (out, in), with NAME.SCB F32 (out,), the largest magnitude per row.

    Other readers also round the inputs to 8 bits when they compute; here only the weights are in 8 bits.
    """

    checkpoint: Checkpoint

    def holds(self, name: str) -> bool:
        """Whether this linear is stored in 8 bits."""
        return f"{name}.SCB" in self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.checkpoint.spec(f"{name}.weight").shape
        return rows, columns

    def bits(self, name: str) -> int:
        """Bits per code."""
        return 8

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        names = (f"{name}.weight", f"{name}.SCB", f"{name}.weight_format")
        return [each for each in names if each in self.checkpoint.tensors]

    def read(self, name: str) -> Tensor:
        """Read the weight, (out, in) float32."""
        codes, largest = self.checkpoint.read(f"{name}.weight"), self.checkpoint.read(f"{name}.SCB")
        weight: Tensor = codes.float() * (largest.float()[:, None] / INT8_STEPS)
        return weight


def opened(checkpoint: Checkpoint) -> Nf4 | Int8:
    """Return the reader of a checkpoint's low-bit linears; raises CheckpointError for other codebooks."""
    config = checkpoint.config["quantization_config"]
    if config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4":
        return Nf4(checkpoint)
    if config.get("load_in_8bit"):
        return Int8(checkpoint)
    raise CheckpointError(f"{checkpoint.folder / 'config.json'}: of bitsandbytes' formats nf4 and int8 can be read")
