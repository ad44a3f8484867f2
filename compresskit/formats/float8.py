"""FP8: weights in floats of 8 bits, read as dense weights.

    NAME            F8_E4M3 (out, in), or (experts, out, in)
    NAME_scale_inv  F32 (ceil(out / rows), ceil(in / columns))   one scale a block: quant_method fp8, as DeepSeek-V3 has it
    NAME_scale      the same for blocks, (out, 1) for outputs,
                    (1,) for the tensor                          compressed-tensors float-quantized and naive-quantized

W[o, i] = NAME[o, i] * scale[o // rows, i // columns]            in the dtype that config.json states

The product is made in 32 bits, of compressed-tensors in the scale's dtype, as its library does, and then rounded.

Without scales the numbers are the weights. The blocks are those that config.json states. transformers 5.24, where it
dequantises, infers them from the scales' shape, which refuses or misreads weights whose sizes the blocks do not divide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from compresskit.checkpoint.reader import FLOATS, Checkpoint
from compresskit.errors import CheckpointError
from compresskit.machine.precision import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = (".weight_scale", "_scale_inv")
"""How the names of scales of weights end."""
OF_ACTIVATIONS = (
    "activation_scale", "input_scale", "input_zero_point", "output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale",
)  # fmt: skip
"""Last parts of the names of tensors that say how activations or the cache were to be rounded; dense weights have none."""
NOT_OF_FLOATS = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
"""Last parts of the names of tensors that other forms have beside the scales."""
EXPONENT_BIAS = 127
SECTION = 256
"""Rows that are dequantised together: some 150 MB in 32 bits in the widest layers in use."""


class Block(NamedTuple):
    """The part of a weight (out, in) that shares a scale; 0 stands for all rows or columns."""

    rows: int
    columns: int

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight of this shape."""
        *experts, rows, columns = shape
        return *experts, -(-rows // (self.rows or rows or 1)), -(-columns // (self.columns or columns or 1))

    def __str__(self) -> str:
        """What it is called in texts."""
        if self == TENSOR:
            return "one scale for each tensor"
        if self == OUTPUT:
            return "one scale for each output"
        return f"groups of {self.columns}" if self.rows == 1 else f"blocks of {self.rows} x {self.columns}"


TENSOR, OUTPUT = Block(0, 0), Block(1, 0)


def dequantized(codes: Tensor, scale: Tensor, block: Block, dtype: torch.dtype, product: torch.dtype) -> Tensor:
    """Dequantise a weight.

    codes (..., out, in) float8, scale (..., blocks down, blocks across). `product` is the dtype of the products before they are
    rounded to `dtype`.

    Returns:
        The weight (..., out, in) in `dtype`.
    """
    import torch

    *_, rows, columns = codes.shape
    found = torch.empty(codes.shape, dtype=dtype)
    row_block, column_block = (
        torch.arange(size) // (part or size or 1) for size, part in ((rows, block.rows), (columns, block.columns))
    )
    parts = (each.reshape(-1, *each.shape[-2:]) for each in (codes, scale.to(product), found))
    for weight, scales, result in zip(*parts, strict=True):
        for start in range(0, rows, SECTION):
            section = slice(start, start + SECTION)
            chosen = scales[row_block[section]]  # (rows of the section, blocks across)
            spread = chosen[:, column_block] if chosen.shape[1] > 1 else chosen
            result[section] = weight[section].to(product) * spread
    return found


@dataclass(frozen=True)
class Float8:
    """The float8 weights of a checkpoint, each with its scale."""

    checkpoint: Checkpoint
    dtype: str
    """Of the dense weights, as safetensors names it."""
    form: str
    """For people."""
    suffixes: tuple[str, ...]
    """What is added to a weight's name for its scale's."""
    blocks_of: Callable[[str], tuple[Block, ...]]
    """The blocks that a weight of this name may have."""
    in_scales_dtype: bool
    """Whether products are first rounded to the scale's dtype, as the library of compressed-tensors does."""

    @cached_property
    def scales(self) -> dict[str, str]:
        """Name of the scale of every float8 weight, in file order; raises CheckpointError where one has none or two."""
        stored = self.checkpoint.tensors
        found = {}
        for name in (name for name, spec in stored.items() if spec.dtype in FLOAT8):
            scales = [name + suffix for suffix in self.suffixes if name + suffix in stored]
            if len(scales) != 1:
                what = "has two scales" if scales else f"has no scale {name}{self.suffixes[0]}"
                raise CheckpointError(
                    f"{place_of_tensor(self.checkpoint, name)} is {stored[name].dtype} and {what}; download it again"
                )
            found[name] = scales[0]
        return found

    @property
    def names(self) -> list[str]:
        """The dense tensors that are made on reading."""
        return list(self.scales)

    @property
    def unused(self) -> list[str]:
        """Stored tensors of which nothing is read."""
        return [name for name in self.checkpoint.tensors if name.rpartition(".")[2] in OF_ACTIVATIONS]

    def holds(self, name: str) -> bool:
        """Whether the dense tensor of this name is made on reading."""
        return name in self.scales

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return self.checkpoint.spec(name).shape

    def stored_tensors(self, name: str) -> list[str]:
        """The stored tensors of which it is made."""
        return [name, self.scales[name]]

    def check(self) -> None:
        """Raise CheckpointError unless every weight has a scale that fits it, and every scale a weight."""
        for name in self.scales:
            self._block(name)
        owned = set(self.scales.values())
        for name in self.checkpoint.tensors:
            weight = name[: -len("_inv")] if name.endswith("_inv") else name
            if name.endswith(SCALES) and name not in owned:
                stored = self.checkpoint.tensors.get(weight.removesuffix("_scale"))
                what = f"of dtype {stored.dtype}, expected F8_E4M3" if stored else "which is missing"
                of = f"the scale of {weight.removesuffix('_scale')}, {what}"
                raise CheckpointError(f"{place_of_tensor(self.checkpoint, name)} is {of}; use another copy of the model")
            if name.rpartition(".")[2] in NOT_OF_FLOATS:
                raise CheckpointError(
                    f"{place_of_tensor(self.checkpoint, name)}: FP8 has no such tensor; use the checkpoint that it was made from"
                )

    def _block(self, name: str) -> Block:
        """The block of a weight; raises CheckpointError if its scale fits none."""
        weight, scale = self.checkpoint.spec(name), self.checkpoint.spec(self.scales[name])
        blocks = self.blocks_of(name)
        numbers = scale.dtype in FLOATS and scale.dtype not in FLOAT8
        exponents = scale.dtype == "U8" and not self.in_scales_dtype
        if len(weight.shape) in (2, 3) and (numbers or exponents):
            for block in blocks:
                if scale.shape == block.grid(weight.shape) or (block == TENSOR and scale.elements == 1):
                    return block
        fitting = [f"{list(block.grid(weight.shape))} ({block})" for block in blocks if len(weight.shape) in (2, 3)]
        expected = f"F32 {' or '.join(fitting)}" if fitting else "none: it has no outputs and inputs"
        raise CheckpointError(
            f"{place_of_tensor(self.checkpoint, scale.name)} is {scale.dtype} {list(scale.shape)}, by config.json the scale of "
            f"{name} {list(weight.shape)} is {expected}; download the model again"
        )

    def read(self, name: str) -> Tensor:
        """Read a dense tensor."""
        import torch

        block = self._block(name)
        codes, scale = self.checkpoint.read(name), self.checkpoint.read(self.scales[name])
        if scale.dtype == torch.uint8:  # exponents of 2, as scale_fmt ue8m0 has them
            scale = torch.ldexp(torch.ones(scale.shape), scale.int() - EXPONENT_BIAS)
        grid = block.grid(tuple(codes.shape))
        scale = scale.reshape(grid) if scale.shape == grid else scale.reshape(1).expand(grid)
        return dequantized(codes, scale, block, torch_dtype(self.dtype), scale.dtype if self.in_scales_dtype else torch.float32)


@dataclass(frozen=True)
class PlainFloat8:
    """Float8 tensors that are the weights themselves: bfloat16 holds every number of both kinds of float8."""

    checkpoint: Checkpoint
    dtype: str = "BF16"
    form: str = "float8 without scales"

    @property
    def names(self) -> list[str]:
        """The dense tensors that are made on reading."""
        return [name for name, spec in self.checkpoint.tensors.items() if spec.dtype in FLOAT8]

    @property
    def unused(self) -> list[str]:
        """Stored tensors of which nothing is read: none."""
        return []

    def holds(self, name: str) -> bool:
        """Whether the dense tensor of this name is made on reading."""
        return name in self.checkpoint.tensors and self.checkpoint.tensors[name].dtype in FLOAT8

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the dense tensor."""
        return self.checkpoint.spec(name).shape

    def stored_tensors(self, name: str) -> list[str]:
        """The stored tensors of which it is made."""
        return [name]

    def read(self, name: str) -> Tensor:
        """Read a dense tensor."""
        return self.checkpoint.read(name).to(torch_dtype(self.dtype))


def place_of_tensor(checkpoint: Checkpoint, name: str) -> str:
    """File and tensor, for errors."""
    return f"{checkpoint.file_of.get(name, checkpoint.folder)}: {name}"
