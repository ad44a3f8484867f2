"""Checkpoints in the GPTQ and AWQ formats, read only: the output of GPTQModel, AutoGPTQ and AutoAWQ.

GPTQ   NAME.qweight  I32 (in * bits / 32, out)      consecutive codes of a column, low bits first
       NAME.qzeros   I32 (groups, out * bits / 32)  zero points packed the same way along out; "gptq" stores them less 1
       NAME.scales   (groups, out)    NAME.g_idx  I32 (in,)  the group of every input
AWQ    NAME.qweight  I32 (in, out / 8)              4-bit codes of 8 outputs in the order 0 2 4 6 1 3 5 7
       NAME.qzeros   I32 (groups, out / 8)          packed the same way;   NAME.scales (groups, out)

W[o, i] = scale[g, o] * (code[i, o] - zero_point[g, o]),  g the group of input i
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import FLOATS, Checkpoint
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
WORD_BITS = 32
AWQ_BITS = 4
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Output index of each 4-bit place in a word, low bits first."""
KNOWN_BITS = (2, 3, 4, 8)


def unpacked(words: Tensor, bits: int) -> Tensor:
    """Unpack a bit stream down the rows of `words` (words, columns) int32 to codes (32 / bits * words, columns) int64."""
    import torch

    each = torch.arange(WORD_BITS)
    stream = ((words.long()[:, None, :] >> each[None, :, None]) & 1).flatten(0, 1)
    weights = 2 ** torch.arange(bits)
    return (stream.view(-1, bits, words.shape[1]) * weights[None, :, None]).sum(dim=1)


@dataclass(frozen=True)
class GPTQFile:
    """The low-bit linears of a GPTQ or AWQ checkpoint."""

    checkpoint: Checkpoint
    width: int
    """Bits per code."""
    group_size: int
    awq: bool
    zero_shift: int
    """Offset to add to stored zero points."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> GPTQFile:
        """Read the configuration; raises CheckpointError for unknown layouts."""
        config: dict[str, Any] = checkpoint.config["quantization_config"]
        place = f"{checkpoint.folder / 'config.json'}: quantization_config"
        awq, bits = config.get("quant_method") == "awq", config.get("bits") or config.get("w_bit") or 0
        layout = str(config.get("version") or "gemm").lower() if awq else config.get("checkpoint_format") or "gptq"
        group = config.get("group_size") or config.get("q_group_size") or -1
        if type(bits) is not int or type(group) is not int or group < -1:
            raise CheckpointError(f"{place}: bits {shown(bits)} and group_size {shown(group)} are no numbers; restore the file")
        if bits not in ((AWQ_BITS,) if awq else KNOWN_BITS) or layout not in (("gemm",) if awq else ("gptq", "gptq_v2")):
            raise CheckpointError(
                f"{place}: {bits} bits in the layout {shown(layout)} are not known; convert it with its own tool"
            )
        return cls(checkpoint, bits, group, awq, 1 if layout == "gptq" else 0)

    def holds(self, name: str) -> bool:
        """Whether this linear is packed."""
        return f"{name}.qweight" in self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.checkpoint.matrix_shape(f"{name}.qweight")
        return (columns * WORD_BITS // AWQ_BITS, rows) if self.awq else (columns, rows * WORD_BITS // self.width)

    def check(self, name: str) -> None:
        """Raise CheckpointError unless the stored tensors of a linear fit each other."""
        (out, inputs), stored = self.shape(name), self.checkpoint.tensors
        words, zeros, scales = (self.checkpoint.spec(f"{name}.{leaf}") for leaf in LEAVES[:3])
        groups = self.checkpoint.matrix_shape(scales.name)[0]
        packed = out * self.width // WORD_BITS
        right = (
            words.dtype == zeros.dtype == "I32" and scales.dtype in FLOATS and min(out, inputs, groups) > 0
            and words.shape[0] * (1 if self.awq else WORD_BITS) == inputs * (1 if self.awq else self.width)
            and zeros.shape == (groups, packed) and packed * WORD_BITS == out * self.width and scales.shape == (groups, out)
        )  # fmt: skip
        ordered = stored.get(f"{name}.g_idx")
        if ordered is None:
            right = right and groups == (-(-inputs // self.group_size) if self.group_size > 0 else 1)
        elif ordered.dtype != "I32" or ordered.shape != (inputs,):
            right = False
        if not right:
            found = ", ".join(f"{spec.dtype} {list(spec.shape)}" for spec in (words, zeros, scales))
            raise CheckpointError(
                f"{self.checkpoint.file_of[words.name]}: {name} is stored as {found}, which do not fit {self.width} bits in "
                f"groups of {self.group_size}; download it again"
            )

    def bits(self, name: str) -> int:
        """Bits per code."""
        return self.width

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        return [f"{name}.{leaf}" for leaf in LEAVES if f"{name}.{leaf}" in self.checkpoint.tensors]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read the weight, (out, in) float32."""
        steps, scales, group_of = self.read_steps(name, device)
        weight: Tensor = steps.float() * scales.float()[group_of]
        return weight.T.contiguous()

    def read_steps(self, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Return (code - zero point (in, out) int64, scales (groups, out) as stored, the group of every input (in,) int64)."""
        import torch

        words, zeros, scales = (self.checkpoint.read(f"{name}.{leaf}").to(device) for leaf in LEAVES[:3])
        if self.awq:
            codes, zero_point = _awq_columns(words), _awq_columns(zeros)
        else:
            codes, zero_point = unpacked(words, self.width), unpacked(zeros.T, self.width).T + self.zero_shift
        inputs = codes.shape[0]
        if f"{name}.g_idx" in self.checkpoint.tensors:
            group_of = self.checkpoint.read(f"{name}.g_idx").to(device).long()
            if int(group_of.min()) < 0 or int(group_of.max()) >= len(scales):
                file = self.checkpoint.file_of[f"{name}.g_idx"]
                raise CheckpointError(f"{file}: {name}.g_idx names a group beyond the {len(scales)} stored; download it again")
        else:
            group_of = torch.arange(inputs, device=device) // (self.group_size if self.group_size > 0 else inputs)
        return codes - zero_point[group_of], scales, group_of


def _awq_columns(words: Tensor) -> Tensor:
    """Unpack (rows, words) int32 to (rows, 8 * words) int64."""
    codes = unpacked(words.T, AWQ_BITS).T
    found = codes.new_empty(codes.shape)
    for place, output in enumerate(AWQ_ORDER):
        found[:, output :: len(AWQ_ORDER)] = codes[:, place :: len(AWQ_ORDER)]
    return found
