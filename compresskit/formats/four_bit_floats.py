"""compressed-tensors `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: linears in floats of 4 bits.

    NAME.weight_packed         U8 (out, in / 2)              two E2M1 codes a byte, the lower four bits first
    NAME.weight_scale          F8_E4M3 (out, in / 16), or U8 (out, in / 32): exponent of 2, plus 127
    NAME.weight_global_scale   F32 (1,)                      nvfp4: the scales are divided by it
    NAME.input_global_scale    F32 (1,)                      nvfp4 with rounded activations: the same for the inputs' scales

nvfp4: W = code * (weight_scale / weight_global_scale); mxfp4: W = code * 2^(weight_scale - 127). Linears with a shared
input share the divisor, because vLLM joins them. Readers unpack to bfloat16.

A group's scale maps its largest magnitude to 6, or to 4 where that gives the smaller squared error (arXiv 2512.02010);
for mxfp4 the exponent is that of OCP Microscaling Formats v1.0, section 6.3, or one more, likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError
from compresskit.formats.packed_checks import place_of, stated_groups
from compresskit.numerics.fixed_scheme import FixedScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.numerics.grid import Grid

FORMATS = {"nvfp4-pack-quantized": 16, "mxfp4-pack-quantized": 32}
"""Inputs per scale by format."""
INPUT_DIVISOR = "input_global_scale"
LEAVES = ("weight_packed", "weight_scale", "weight_global_scale", INPUT_DIVISOR)
LARGEST_SCALE = 256.0
"""Of the scales that map to 6; those that map to 4 are half as large again and still fit E4M3."""


def tensor_specs(name: str, shape: tuple[int, int], scheme: FixedScheme, scale_dtype: str) -> list[TensorSpec]:
    """Stored tensors of one linear (out, in); `name` without `.weight`. The format fixes the dtypes."""
    rows, columns = shape
    two_levels = scheme.format == "nvfp4"
    specs = [
        TensorSpec(f"{name}.weight_packed", "U8", (rows, columns // 2)),
        TensorSpec(f"{name}.weight_scale", "F8_E4M3" if two_levels else "U8", (rows, scheme.groups(columns))),
    ]
    if two_levels:
        specs.append(TensorSpec(f"{name}.weight_global_scale", "F32", (1,)))
        if scheme.activations == "dynamic":
            specs.append(TensorSpec(f"{name}.{INPUT_DIVISOR}", "F32", (1,)))
    return specs


def grids(weights: Sequence[Tensor], scheme: FixedScheme, scale_dtype: torch.dtype) -> list[Grid]:
    """Choose the scales of linears (out, in) with a shared input.

    Returns:
        Scales (out, groups) float32 as readers see them, no zero points, and for nvfp4 the divisor of all these linears.
    """
    import torch

    from compresskit.numerics.float_grid import E2M1_LARGEST

    if scheme.format == "mxfp4":
        return [_least_error(weight, scheme, _power_scales(weight, scheme)) for weight in weights]
    largest = torch.stack([weight.float().abs().amax() for weight in weights]).amax().clamp_min(torch.finfo(torch.float32).tiny)
    divisor = (LARGEST_SCALE * E2M1_LARGEST / largest).clamp_max(torch.finfo(torch.float32).max).reshape(1)
    return [_least_error(weight, scheme, _two_level_scales(weight, scheme, divisor), divisor) for weight in weights]


def _power_scales(weight: Tensor, scheme: FixedScheme) -> list[Tensor]:
    """The powers of 2 that a group may be scaled with, (out, groups) each."""
    import torch

    from compresskit.numerics.float_grid import scale_exponents
    from compresskit.numerics.grid import grouped

    largest = grouped(weight.float(), scheme).abs().amax(dim=-1)
    return [torch.ldexp(torch.ones_like(largest), scale_exponents(largest) + more) for more in (0, 1)]


def _two_level_scales(weight: Tensor, scheme: FixedScheme, divisor: Tensor) -> list[Tensor]:
    """The scales E4M3 / divisor that map a group's largest magnitude to 6 and to 4, (out, groups) each."""
    from compresskit.numerics.float_grid import E4M3_SMALLEST, nearest_e4m3
    from compresskit.numerics.grid import grouped

    largest = grouped(weight.float(), scheme).abs().amax(dim=-1)
    return [nearest_e4m3(largest / code * divisor).clamp_min(E4M3_SMALLEST) / divisor for code in (6.0, 4.0)]


def _least_error(weight: Tensor, scheme: FixedScheme, scales: Sequence[Tensor], divisor: Tensor | None = None) -> Grid:
    """Of several scales for every group, those with the least squared error."""
    import torch

    from compresskit.numerics.grid import Grid
    from compresskit.numerics.grid_search import rounding_error

    best, *others = [Grid(scale, torch.zeros_like(scale), divisor) for scale in scales]
    least = rounding_error(weight, best, scheme)
    for grid in others:
        error = rounding_error(weight, grid, scheme)
        best = Grid(torch.where(error < least, grid.scale, best.scale), best.zero_point, divisor)
        least = torch.minimum(error, least)
    return best


def stored_linear(codes: Tensor, grid: Grid, scheme: FixedScheme, scale_dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Pack a linear. codes (out, in): E2M1 numbers, float32.

    Returns:
        (the stored tensors by leaf name, the weight (out, in) float32 that readers unpack).
    """
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    from compresskit.numerics.float_grid import E8M0_BIAS
    from compresskit.numerics.grid import from_codes

    tensors = {"weight_packed": pack_fp4_to_uint8(codes.float())}
    if grid.divisor is None:
        tensors["weight_scale"] = (torch.frexp(grid.scale).exponent - 1 + E8M0_BIAS).to(torch.uint8)
    else:
        tensors["weight_scale"] = (grid.scale * grid.divisor).to(torch.float8_e4m3fn)
        tensors["weight_global_scale"] = grid.divisor.float()
    return tensors, from_codes(codes, grid, scheme, torch.bfloat16)


def arguments(scheme: FixedScheme) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """(compressed-tensors' name of the format, its arguments of the weights, those of the activations)."""
    two_levels = scheme.format == "nvfp4"
    dtype = "torch.float8_e4m3fn" if two_levels else "torch.uint8"
    number: dict[str, Any] = {
        "num_bits": 4, "type": "float", "strategy": "tensor_group" if two_levels else "group", "group_size": scheme.group_size,
        "scale_dtype": dtype, "zp_dtype": dtype,
    }  # fmt: skip
    inputs = number | {"dynamic": "local" if two_levels else True} if scheme.activations == "dynamic" else None
    return f"{scheme.format}-pack-quantized", number, inputs


@dataclass(frozen=True)
class PackedFloats:
    """The packed linears of a checkpoint."""

    checkpoint: Checkpoint
    group_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, form: str) -> PackedFloats:
        """Read the configuration; raises CheckpointError unless every group has the format's weights."""
        size = FORMATS[form]
        for group in stated_groups(checkpoint):
            weights = group.weights
            if (weights.get("type"), weights.get("num_bits"), weights.get("group_size")) != ("float", 4, size):
                what = f"{shown(weights.get('num_bits'))} bits of {shown(weights.get('type'))}"
                what += f" in groups of {shown(weights.get('group_size'))}"
                raise CheckpointError(f"{place_of(checkpoint)}: {what}; {form} has floats of 4 bits in groups of {size}")
        return cls(checkpoint, size)

    def holds(self, name: str) -> bool:
        """Whether this linear is packed."""
        return f"{name}.weight_packed" in self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        rows, half = self.checkpoint.matrix_shape(f"{name}.weight_packed")
        return rows, 2 * half

    def check(self, name: str) -> None:
        """Raise CheckpointError unless the stored tensors of a linear fit each other."""
        rows, columns = self.shape(name)
        kinds: dict[str, tuple[str, tuple[int, ...]]] = {"weight_packed": ("U8", (rows, columns // 2))}
        kinds["weight_scale"] = ("F8_E4M3" if self._two_levels else "U8", (rows, columns // self.group_size))
        if self._two_levels:
            kinds["weight_global_scale"] = ("F32", (1,))
        for leaf, (dtype, shape) in kinds.items():
            spec = self.checkpoint.spec(f"{name}.{leaf}")
            if (spec.dtype, spec.shape) != (dtype, shape) or columns % self.group_size:
                found = f"{spec.name} is {spec.dtype} {list(spec.shape)}"
                raise CheckpointError(
                    f"{self.checkpoint.file_of[spec.name]}: {found}, expected {dtype} {list(shape)}; download it again"
                )

    @property
    def _two_levels(self) -> bool:
        return self.group_size == FORMATS["nvfp4-pack-quantized"]

    def bits(self, name: str) -> int:
        """Bits per code."""
        return 4

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        return [f"{name}.{leaf}" for leaf in LEAVES if f"{name}.{leaf}" in self.checkpoint.tensors]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read the weight, (out, in), in bfloat16, as the library unpacks it."""
        import torch
        from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

        from compresskit.numerics.float_grid import E8M0_BIAS

        rows, columns = self.shape(name)
        codes = unpack_fp4_from_uint8(
            self.checkpoint.read(f"{name}.weight_packed").to(device), rows, columns, dtype=torch.float32
        )
        scale = self.checkpoint.read(f"{name}.weight_scale").to(device)
        if self._two_levels:
            scale = scale.float() / self.checkpoint.read(f"{name}.weight_global_scale").to(device)
        else:
            scale = torch.ldexp(torch.ones(scale.shape, device=device), scale.int() - E8M0_BIAS)
        found: Tensor = codes.reshape(rows, -1, self.group_size) * scale.unsqueeze(-1)
        return found.flatten(1).to(torch.bfloat16)
