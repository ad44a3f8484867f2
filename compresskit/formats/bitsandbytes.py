"""bitsandbytes NF4: 4-bit linears on the quantiles of a normal distribution, readable by transformers.

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
from importlib import import_module
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import parse_json, shown
from compresskit.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATE = "quant_state.bitsandbytes__nf4"
STATE_BYTES = 256
CODEBOOK = 16
AGAIN = "download it again"
INT8_STEPS = 127
NESTED_BLOCK = 256
"""Block maxima per second-level maximum; fixed by the library."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes of the library."""
STATED = ("quant_type", "blocksize", "dtype", "shape")
NESTED_STATED = ("nested_blocksize", "nested_dtype", "nested_offset")
"""Keys of the state, and those of one with nested maxima."""
DTYPES = ("float32", "float16", "bfloat16")
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
    library = _library()
    codes, state = library.quantize_4bit(weight.contiguous(), blocksize=block_size, compress_statistics=nested, quant_type="nf4")
    found = {"weight": codes}
    for leaf, value in state.as_dict(packed=True).items():
        found[f"weight.{leaf}"] = _padded(bytes(value.tolist())) if leaf == STATE else value
    return found, library.dequantize_4bit(codes, state).float()


def _library() -> Any:
    """`bitsandbytes.functional`, imported without a word."""
    from compresskit.checkpoint.stock import quiet

    with quiet():
        return import_module("bitsandbytes.functional")


def empty_state(shape: tuple[int, int], block_size: int, nested: bool) -> Tensor:
    """The state of a linear (out, in) whose codes are not known yet, U8 (256,)."""
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block_size, "dtype": "float32", "shape": list(shape)}
    if nested:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": 0.0}
    return _padded(json.dumps(state).encode())


def _padded(text: bytes) -> Tensor:
    import torch

    return torch.tensor(list(text.ljust(STATE_BYTES)), dtype=torch.uint8)


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
        """The JSON beside the codes; raises CheckpointError if the library could not use it."""
        tensor = f"{name}.weight.{STATE}"
        where = f"{self.checkpoint.file_of[tensor]}: {tensor}"
        numbers = self.checkpoint.read_numbers(tensor)
        if self.checkpoint.spec(tensor).dtype != "U8":
            raise CheckpointError(f"{where} is {self.checkpoint.spec(tensor).dtype}, expected the bytes of JSON; {AGAIN}")
        found = parse_json(bytes(numbers).decode("utf-8", "replace"), where)
        shape, offset = found.get("shape"), found.get("nested_offset", 0.0)
        right = (
            found.get("quant_type") == "nf4" and found.get("dtype") in DTYPES and found.get("blocksize") in BLOCKS
            and found.keys() <= {*STATED, *NESTED_STATED}
            and type(found["blocksize"]) is int and type(found.get("nested_blocksize", 0)) is int
            and found.get("nested_blocksize", NESTED_BLOCK) == NESTED_BLOCK
            and found.get("nested_dtype", "float32") in DTYPES and type(offset) in (int, float)
            and isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
        )  # fmt: skip
        if not right:
            raise CheckpointError(f"{where} says {shown(found)}, which is no state of an NF4 linear; {AGAIN}")
        return found

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in), read from the JSON beside the codes."""
        rows, columns = self._state(name)["shape"]
        return rows, columns

    def check(self, name: str) -> None:
        """Raise CheckpointError unless the stored tensors of a linear fit its state."""
        state, stored = self._state(name), self.checkpoint.tensors
        nested = f"{name}.weight.nested_absmax" in stored
        if nested and not state.keys() >= set(NESTED_STATED):
            file = self.checkpoint.file_of[f"{name}.weight.{STATE}"]
            raise CheckpointError(f"{file}: {name} has nested maxima, its state has not {NESTED_STATED}; {AGAIN}")
        for expected in tensor_specs(name, self.shape(name), state["blocksize"], nested):
            found = self.checkpoint.spec(expected.name)
            codes = expected.name == f"{name}.weight"  # some files store the codes as wider numbers
            right = found.bytes == expected.bytes if codes else found.elements == expected.elements
            if expected.name.endswith(STATE) or (right and (codes or found.dtype == expected.dtype)):
                continue
            what = (
                f"{found.name} is {found.dtype} {list(found.shape)}, its state asks for {expected.dtype} {list(expected.shape)}"
            )
            raise CheckpointError(f"{self.checkpoint.file_of[found.name]}: {what}; {AGAIN}")

    def bits(self, name: str) -> int:
        """Bits per code."""
        return 4

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        names = (f"{name}.weight", *(f"{name}.weight.{leaf}" for leaf in LEAVES))
        return [each for each in names if each in self.checkpoint.tensors]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read the weight, (out, in), in the dtype before quantisation."""
        import torch

        library = _library()
        found = {each.removeprefix(f"{name}.weight."): self.checkpoint.read(each) for each in self.stored_tensors(name)}
        stored = {key: tensor.to(device) for key, tensor in found.items()}
        codes = stored.pop(f"{name}.weight")
        weight: Tensor = library.dequantize_4bit(codes, library.QuantState.from_dict(stored, device=torch.device(device)))
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
        return self.checkpoint.matrix_shape(f"{name}.weight")

    def check(self, name: str) -> None:
        """Raise CheckpointError unless the codes and the scales fit each other."""
        codes, scales = self.checkpoint.spec(f"{name}.weight"), self.checkpoint.spec(f"{name}.SCB")
        if codes.dtype != "I8" or scales.dtype != "F32" or scales.elements != self.shape(name)[0]:
            what = f"{codes.dtype} {list(codes.shape)} with {scales.dtype} {list(scales.shape)} scales"
            raise CheckpointError(f"{self.checkpoint.file_of[codes.name]}: {codes.name} is {what}; {AGAIN}")

    def bits(self, name: str) -> int:
        """Bits per code."""
        return 8

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        names = (f"{name}.weight", f"{name}.SCB", f"{name}.weight_format")
        return [each for each in names if each in self.checkpoint.tensors]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read the weight, (out, in) float32."""
        codes, largest = (self.checkpoint.read(f"{name}.{leaf}").to(device) for leaf in ("weight", "SCB"))
        weight: Tensor = codes.float() * (largest.float().reshape(-1, 1) / INT8_STEPS)
        return weight


def opened(checkpoint: Checkpoint) -> Nf4 | Int8:
    """Return the reader of a checkpoint's low-bit linears; raises CheckpointError for other codebooks."""
    config = checkpoint.config["quantization_config"]
    if config.get("load_in_4bit") and config.get("bnb_4bit_quant_type") == "nf4":
        return Nf4(checkpoint)
    if config.get("load_in_8bit"):
        return Int8(checkpoint)
    raise CheckpointError(f"{checkpoint.folder / 'config.json'}: of bitsandbytes' formats nf4 and int8 can be read")
