"""MXFP4: the experts of gpt-oss in floats of 4 bits with shared exponents, read as dense weights.

    NAME_blocks  U8 (experts, out, groups, 16)   two codes a byte, the lower four bits first
    NAME_scales  U8 (experts, out, groups)       exponent of 2, plus 127, of 32 inputs

W[e, i, o] = value[code[e, o, i]] * 2^(scale[e, o, i // 32] - 127)      value: the 16 floats of 4 bits, E2M1

The dense weight is NAME (experts, in, out), as the family's module has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from compresskit.checkpoint.reader import Checkpoint
from compresskit.errors import CheckpointError
from compresskit.machine.precision import torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCKS, SCALES = "_blocks", "_scales"
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By the lower three bits of a code; the fourth is the sign."""
GROUP_BYTES = 16
EXPONENT_BIAS = 127


def dequantized(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantise experts. blocks (experts, out, groups, 16), scales (experts, out, groups), both U8 -> (experts, in, out)."""
    import torch

    experts, rows, groups, each = blocks.shape
    values = torch.tensor([sign * magnitude for sign in (1.0, -1.0) for magnitude in MAGNITUDES])
    found = torch.empty(experts, groups * each * 2, rows, dtype=dtype)
    for expert in range(experts):  # one at a time, because the codes become indices of 64 bits
        codes = torch.stack((blocks[expert] & 15, blocks[expert] >> 4), dim=-1).flatten(2)
        exponents = scales[expert].int()[..., None] - EXPONENT_BIAS
        found[expert] = torch.ldexp(values[codes.long()], exponents).flatten(1).T
    return found


@dataclass(frozen=True)
class Mxfp4:
    """The packed experts of a checkpoint."""

    checkpoint: Checkpoint
    dtype: str
    """Of the dense weights, as safetensors names it."""
    form: str = "MXFP4"

    @cached_property
    def names(self) -> list[str]:
        """The dense tensors that are made on reading."""
        stored = self.checkpoint.tensors
        ends = [name.removesuffix(BLOCKS) for name, spec in stored.items() if name.endswith(BLOCKS) and spec.dtype == "U8"]
        return [name for name in ends if name]

    @property
    def unused(self) -> list[str]:
        """Stored tensors of which nothing is read: none."""
        return []

    def holds(self, name: str) -> bool:
        """Whether the dense tensor of this name is made on reading."""
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """(experts, in, out)."""
        experts, rows, groups, each = self.checkpoint.spec(name + BLOCKS).shape
        return experts, groups * each * 2, rows

    def stored_tensors(self, name: str) -> list[str]:
        """The stored tensors of which it is made."""
        return [name + BLOCKS, name + SCALES]

    def check(self) -> None:
        """Raise CheckpointError unless every tensor's codes and exponents fit each other."""
        for name in self.names:
            blocks, scales = (self.checkpoint.spec(each) for each in self.stored_tensors(name))
            right = len(blocks.shape) == 4 and blocks.shape[-1] == GROUP_BYTES
            if not right or scales.dtype != "U8" or scales.shape != blocks.shape[:-1] or name in self.checkpoint.tensors:
                what = f"{blocks.name} is {blocks.dtype} {list(blocks.shape)}, its scales {scales.dtype} {list(scales.shape)}"
                expected = f"expected U8 (experts, out, groups, {GROUP_BYTES}) and U8 (experts, out, groups)"
                raise CheckpointError(f"{self.checkpoint.file_of[blocks.name]}: {what}, {expected}; download it again")

    def read(self, name: str) -> Tensor:
        """Read a dense tensor."""
        blocks, scales = (self.checkpoint.read(each) for each in self.stored_tensors(name))
        return dequantized(blocks, scales, torch_dtype(self.dtype))


def opened(checkpoint: Checkpoint, dtype: str) -> Mxfp4:
    """Open a checkpoint with quant_method mxfp4; raises CheckpointError if codes and exponents do not fit each other."""
    found = Mxfp4(checkpoint, dtype)
    found.check()
    return found
