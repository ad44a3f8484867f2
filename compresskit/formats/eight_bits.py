"""compressed-tensors `float-quantized` and `int-quantized`: linears in 8 bits, as transformers and vLLM load them.

    NAME.weight         F8_E4M3 or I8 (out, in)
    NAME.weight_scale   F32 or BF16 (out, 1), of blocks (ceil(out / 128), in / 128)
    NAME.input_scale    F32 (1,), of static activations

W[o, i] = weight[o, i] * weight_scale, in the scale's dtype. Scales are BF16 for bfloat16 sources, which transformers needs
to keep them where it does not dequantise on loading, else F32: small rows would not fit 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import FLOATS, Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError
from compresskit.formats.packed_checks import place_of, stated_groups
from compresskit.numerics.fixed_scheme import FixedScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.numerics.grid import Grid

INT_FORMAT, FLOAT_FORMAT = "int-quantized", "float-quantized"
INPUT_SCALE = "input_scale"
BLOCK = 128


def stored_scale_dtype(scale_dtype: str) -> str:
    """Dtype of the scales for a checkpoint whose packed scales would have this one; both as safetensors names them."""
    return "BF16" if scale_dtype == "BF16" else "F32"


def tensor_specs(name: str, shape: tuple[int, int], scheme: FixedScheme, scale_dtype: str) -> list[TensorSpec]:
    """Stored tensors of one linear (out, in); `name` without `.weight`, `scale_dtype` as safetensors names it."""
    rows, columns = shape
    dtype = stored_scale_dtype(scale_dtype)
    specs = [
        TensorSpec(f"{name}.weight", "I8" if scheme.element == "int8" else "F8_E4M3", shape),
        TensorSpec(f"{name}.weight_scale", dtype, (-(-rows // scheme.rows), scheme.groups(columns))),
    ]
    return [*specs, TensorSpec(f"{name}.{INPUT_SCALE}", "F32", (1,))] if scheme.activations == "static" else specs


def grids(weights: Sequence[Tensor], scheme: FixedScheme, scale_dtype: torch.dtype) -> list[Grid]:
    """Span the largest weight of every output or block; weights (out, in) in any float dtype.

    Returns:
        Scales (out, groups) float32, rounded to their stored dtype, the same for the outputs of a block; no zero points.
    """
    return [_grid(weight, scheme, _rounded_to(scale_dtype)) for weight in weights]


def _rounded_to(scale_dtype: torch.dtype) -> torch.dtype:
    """`stored_scale_dtype` in torch's dtypes."""
    import torch

    return torch.bfloat16 if scale_dtype == torch.bfloat16 else torch.float32


def _grid(weight: Tensor, scheme: FixedScheme, dtype: torch.dtype) -> Grid:
    import torch

    from compresskit.numerics.float_grid import E4M3_LARGEST
    from compresskit.numerics.grid import Grid, grouped
    from compresskit.numerics.scales import rounded_scale

    largest = grouped(weight.float(), scheme).abs().amax(dim=-1)
    if scheme.rows > 1:
        largest = torch.cat([part.amax(dim=0, keepdim=True).expand_as(part) for part in torch.split(largest, scheme.rows)])
    scale = rounded_scale(largest / (E4M3_LARGEST if scheme.element == "e4m3" else scheme.steps / 2), dtype)
    return Grid(scale, torch.zeros_like(scale))


def stored_linear(codes: Tensor, grid: Grid, scheme: FixedScheme, scale_dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Store a linear. codes (out, in): whole numbers or E4M3 numbers, float32.

    Returns:
        (the stored tensors by leaf name, the weight (out, in) float32 that readers unpack).
    """
    import torch

    from compresskit.numerics.grid import from_codes

    dtype = _rounded_to(scale_dtype)
    stored = codes.to(torch.int8 if scheme.element == "int8" else torch.float8_e4m3fn)
    tensors = {"weight": stored, "weight_scale": grid.scale[:: scheme.rows].to(dtype).contiguous()}
    return tensors, from_codes(codes, grid, scheme, dtype)


def arguments(scheme: FixedScheme) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
    """(compressed-tensors' name of the format, its arguments of the weights, those of the activations)."""
    number: dict[str, Any] = {"num_bits": 8, "type": "int" if scheme.element == "int8" else "float"}
    structure = {"strategy": "block", "block_structure": [BLOCK, BLOCK]} if scheme.rows > 1 else {"strategy": "channel"}
    rounded = {"strategy": "group", "group_size": BLOCK} if scheme.rows > 1 else {"strategy": "token"}
    if scheme.activations == "static":
        rounded = {"strategy": "tensor"}
    inputs = number | rounded | {"dynamic": scheme.activations == "dynamic"}
    return INT_FORMAT if scheme.element == "int8" else FLOAT_FORMAT, number | structure, inputs


@dataclass(frozen=True)
class IntQuantized:
    """The linears of a checkpoint in whole numbers of 8 bits with a scale for each output or tensor."""

    checkpoint: Checkpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> IntQuantized:
        """Read the configuration; raises CheckpointError unless every group has symmetric weights in 8 bits."""
        for group in stated_groups(checkpoint):
            weights = group.weights
            known = weights.get("strategy") in ("channel", "tensor") and weights.get("symmetric", True) is True
            if (weights.get("type"), weights.get("num_bits")) != ("int", 8) or not known:
                what = (
                    f"{shown(weights.get('num_bits'))} bits of {shown(weights.get('type'))} by {shown(weights.get('strategy'))}"
                )
                raise CheckpointError(f"{place_of(checkpoint)}: {what}; of {INT_FORMAT} 8 symmetric bits by channel are known")
        return cls(checkpoint)

    def holds(self, name: str) -> bool:
        """Whether this linear is stored in whole numbers."""
        spec = self.checkpoint.tensors.get(f"{name}.weight")
        return spec is not None and spec.dtype == "I8"

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in)."""
        return self.checkpoint.matrix_shape(f"{name}.weight")

    def check(self, name: str) -> None:
        """Raise CheckpointError unless a linear has a scale that fits."""
        scale = self.checkpoint.spec(f"{name}.weight_scale")
        rows, _ = self.shape(name)
        if scale.dtype not in FLOATS or scale.shape not in ((rows, 1), (1,), ()):
            file, found = self.checkpoint.file_of[scale.name], f"{scale.name} is {scale.dtype} {list(scale.shape)}"
            raise CheckpointError(f"{file}: {found}, expected floats {[rows, 1]} or [1]; download it again")

    def bits(self, name: str) -> int:
        """Bits per code."""
        return 8

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        leaves = ("weight", "weight_scale", INPUT_SCALE)
        return [f"{name}.{leaf}" for leaf in leaves if f"{name}.{leaf}" in self.checkpoint.tensors]

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read the weight, (out, in), in its scale's dtype."""
        scale = self.checkpoint.read(f"{name}.weight_scale").to(device)
        return self.checkpoint.read(f"{name}.weight").to(device).to(scale.dtype) * scale
