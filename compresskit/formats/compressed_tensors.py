"""compressed-tensors `pack-quantized`: low-bit linears that transformers, peft and vLLM load.

    NAME.weight_packed      I32 (out, ceil(in * bits / 32))        signed codes + 2^(bits-1), packed along the inputs
    NAME.weight_scale       F16 or BF16 (out, groups)
    NAME.weight_zero_point  I32 (ceil(out * bits / 32), groups)    packed along the outputs; none where symmetric
    NAME.weight_shape       I64 (2,)

Readers compute (code - zero point) * scale in the scale's dtype. Files with one scheme, or one for all experts and one for
all other linears, set `"dequantize": true`; without it, transformers cannot load zero points (of experts it never does).
Files of more schemes load only without it: they are symmetric, and computed in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.errors import CheckpointError, NumericalError
from compresskit.formats.packed_checks import Groups, check_stored, config_groups, place_of, stored_shape, unpacking
from compresskit.formats.patterns import Patterns
from compresskit.numerics.scheme import Scheme, packed_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.numerics.grid import Grid

FORMAT = "pack-quantized"
LEAVES = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")


def tensor_specs(name: str, shape: tuple[int, int], scheme: Scheme, scale_dtype: str) -> list[TensorSpec]:
    """Stored tensors of one linear (out, in); `name` without `.weight`, `scale_dtype` as safetensors names it."""
    rows, columns = shape
    groups = scheme.groups(columns)
    specs = [
        TensorSpec(f"{name}.weight_packed", "I32", (rows, packed_words(columns, scheme.bits))),
        TensorSpec(f"{name}.weight_scale", scale_dtype, (rows, groups)),
        TensorSpec(f"{name}.weight_shape", "I64", (2,)),
    ]
    if not scheme.symmetric:
        specs.append(TensorSpec(f"{name}.weight_zero_point", "I32", (packed_words(rows, scheme.bits), groups)))
    return specs


def stored_linear(
    codes: Tensor, grid: Grid, scheme: Scheme, scale_dtype: torch.dtype, unpacked: torch.dtype | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Pack a linear. codes (out, in) are signed whole numbers in any dtype; readers unpack to `unpacked`, else `scale_dtype`.

    Returns:
        (the stored tensors by leaf name, the weight (out, in) float32 that readers unpack).

    Raises:
        NumericalError: a code or zero point is outside the scheme's range.
    """
    import torch

    from compresskit.numerics.bit_packing import packed
    from compresskit.numerics.grid import from_codes

    for what, values in (("code", codes), ("zero point", grid.zero_point)):
        if bool((values < scheme.lowest).any()) or bool((values > scheme.highest).any()):
            raise NumericalError(f"a {what} lies outside {scheme.lowest} to {scheme.highest}; this is a bug, please report it")
    found = {
        "weight_packed": packed(codes, scheme.bits),
        "weight_scale": grid.scale.to(scale_dtype),
        "weight_shape": torch.tensor(codes.shape),
    }
    if not scheme.symmetric:
        found["weight_zero_point"] = packed(grid.zero_point.T, scheme.bits).T.contiguous()
    return found, from_codes(codes, grid, scheme, unpacked or scale_dtype)


def unpacked_linear(tensors: Mapping[str, Tensor], shape: tuple[int, int], scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """What stored tensors, by leaf name, hold of a linear (out, in).

    Returns:
        (codes (out, in) int8, zero points (out, groups) int8, scales (out, groups) in their stored dtype).
    """
    import torch

    from compresskit.numerics.bit_packing import unpacked

    scale, (rows, columns) = tensors["weight_scale"], shape
    codes = unpacked(tensors["weight_packed"], scheme.bits, columns)
    if scheme.symmetric:
        return codes, torch.zeros(scale.shape, dtype=torch.int8, device=scale.device), scale
    return codes, unpacked(tensors["weight_zero_point"].T, scheme.bits, rows).T, scale


def weight_of(codes: Tensor, zero_point: Tensor, scale: Tensor) -> Tensor:
    """(code - zero point) * scale, computed in the scale's dtype: (out, in); the other two are (out, groups)."""
    steps: Tensor = codes.to(scale.dtype).reshape(*scale.shape, -1) - zero_point.to(scale.dtype).unsqueeze(-1)
    return (steps * scale.unsqueeze(-1)).flatten(1)


def as_read(tensors: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The weight that readers unpack of stored tensors, by leaf name, if they compute in `dtype`: (out, in)."""
    rows, columns = tensors["weight_shape"].tolist()
    codes, zero_point, scale = unpacked_linear(tensors, (rows, columns), scheme)
    return weight_of(codes, zero_point, scale.to(dtype))


@dataclass(frozen=True)
class PackQuantized:
    """The packed linears of a checkpoint."""

    checkpoint: Checkpoint
    schemes: Groups
    """(targets, scheme) of each config group."""
    patterns: Patterns = field(compare=False)

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PackQuantized:
        """Read the configuration; raises CheckpointError for other formats, and unless codes are integers by group or row."""
        return cls(checkpoint, config_groups(checkpoint, FORMAT), Patterns(place_of(checkpoint)))

    def holds(self, name: str) -> bool:
        """Whether this linear is packed."""
        return f"{name}.weight_packed" in self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in), read from the 16 bytes of `weight_shape`."""
        return stored_shape(self.checkpoint, f"{name}.weight_shape")

    def check(self, name: str) -> None:
        """Raise CheckpointError unless the stored tensors of a linear are those of its shape and scheme."""
        scheme, shape = self.scheme(name), self.shape(name)
        check_stored(self.checkpoint, scheme, shape, tensor_specs(name, shape, scheme, "F16"))

    def bits(self, name: str) -> int:
        """Bits per code."""
        return self.scheme(name).bits

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        return [f"{name}.{leaf}" for leaf in LEAVES if f"{name}.{leaf}" in self.checkpoint.tensors]

    def scheme(self, name: str) -> Scheme:
        """Scheme of a linear, from the first group that targets it; raises CheckpointError if none does."""
        for targets, scheme in self.schemes:
            if any(self.patterns.targets(target, name) for target in targets):
                return scheme
        raise CheckpointError(f"{self.checkpoint.folder}: {name} is packed, but no config group targets it")

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read the weight, (out, in), in its scale's dtype; readers that keep it packed compute in the model's own dtype."""
        with unpacking(self.checkpoint, name):
            return self._unpacked(name, device)

    def read_codes(self, name: str, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Read (codes (out, in) int8, zero points (out, groups) int8, scales (out, groups) in their stored dtype) of a linear."""
        scheme = self.scheme(name)
        leaves = ("weight_packed", "weight_scale", *(() if scheme.symmetric else ("weight_zero_point",)))
        tensors = {leaf: self.checkpoint.read(f"{name}.{leaf}").to(device) for leaf in leaves}
        return unpacked_linear(tensors, self.shape(name), scheme)

    def _unpacked(self, name: str, device: torch.device | str) -> Tensor:
        import torch

        config = self.checkpoint.config
        codes, zero_point, scale = self.read_codes(name, device)
        if not config["quantization_config"].get("dequantize"):
            scale = scale.to(getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32")))
        if f"{name}.weight_g_idx" in self.checkpoint.tensors:  # column groups reordered by activation order
            group_of = self.checkpoint.read(f"{name}.weight_g_idx").to(device).long()
            if int(group_of.min()) < 0 or int(group_of.max()) >= scale.shape[1]:
                raise CheckpointError(f"{self.checkpoint.folder}: {name}.weight_g_idx names no stored group; download it again")
            found: Tensor = (codes.to(scale.dtype) - zero_point.to(scale.dtype)[:, group_of]) * scale[:, group_of]
            return found
        return weight_of(codes, zero_point, scale)
