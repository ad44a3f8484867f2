"""Storage formats: dense, compressed-tensors, bitsandbytes, GPTQ and AWQ weights, and PEFT adapters.

A `Format` describes the low-bit linears of one checkpoint: which ones they are, their shapes and their weights. Only
`read` imports torch. Dense models whose files are in FP8 or MXFP4 are no low-bit format: see stored_forms.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeAlias

from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.formats.compressed_tensors import PackQuantized
    from compresskit.formats.eight_bits import IntQuantized
    from compresskit.formats.four_bit_floats import PackedFloats


Device: TypeAlias = "torch.device | str"


class Format(Protocol):
    """The low-bit linears of one checkpoint. `name` is a linear's stored name, without `.weight`."""

    def holds(self, name: str) -> bool:
        """Whether this linear is stored in this format."""

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in) of the linear."""

    def bits(self, name: str) -> int:
        """Bits per code."""

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""

    def read(self, name: str, device: Device = "cpu") -> Tensor:
        """Read the weight as stock tools unpack it, (out, in); it is unpacked on this device."""


def open_format(checkpoint: Checkpoint) -> Format | None:
    """Return the low-bit format of a checkpoint, None if dense; raises CheckpointError for unsupported formats."""
    found = checkpoint.config.get("quantization_config")
    if found is None:
        return None
    from compresskit.formats import bitsandbytes
    from compresskit.formats.gptq import GPTQFile

    method = found.get("quant_method") if isinstance(found, dict) else None
    opened: PackQuantized | IntQuantized | PackedFloats | bitsandbytes.Nf4 | bitsandbytes.Int8 | GPTQFile | None = None
    if method == "compressed-tensors":
        opened = _compressed_tensors(checkpoint)
    elif method == "bitsandbytes":
        opened = bitsandbytes.opened(checkpoint)
    elif method in ("gptq", "awq"):
        opened = GPTQFile.of(checkpoint)
    if opened is not None:
        for name in dict.fromkeys(name.rpartition(".")[0].removesuffix(".weight") for name in checkpoint.tensors):
            if opened.holds(name):
                opened.check(name)
        return opened
    raise CheckpointError(
        f"{checkpoint.folder / 'config.json'}: quantized by {shown(method)}; "
        "known are compressed-tensors (pack-, float-, int-, nvfp4-pack- and mxfp4-pack-quantized), "
        "bitsandbytes (nf4, int8), gptq, awq, fp8 and mxfp4"
    )


def _compressed_tensors(checkpoint: Checkpoint) -> PackQuantized | IntQuantized | PackedFloats:
    """The low-bit linears of a compressed-tensors file, by the format of all its groups."""
    from compresskit.formats.compressed_tensors import PackQuantized
    from compresskit.formats.eight_bits import INT_FORMAT, IntQuantized
    from compresskit.formats.four_bit_floats import FORMATS, PackedFloats
    from compresskit.formats.packed_checks import stated_groups

    form, *others = (group.format for group in stated_groups(checkpoint))
    alike = all(other == form for other in others)
    if form == INT_FORMAT and alike:
        return IntQuantized.of(checkpoint)
    if isinstance(form, str) and form in FORMATS and alike:
        return PackedFloats.of(checkpoint, form)
    return PackQuantized.of(checkpoint)
