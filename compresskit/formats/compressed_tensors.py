"""compressed-tensors `pack-quantized`: low-bit linears that transformers, peft and vLLM load.

    NAME.weight_packed      I32 (out, ceil(in * bits / 32))        signed codes + 2^(bits-1), packed along the inputs
    NAME.weight_scale       F16 or BF16 (out, groups)
    NAME.weight_zero_point  I32 (ceil(out * bits / 32), groups)    packed along the outputs; none where symmetric
    NAME.weight_shape       I64 (2,)

Readers compute (code - zero point) * scale in the scale's dtype. The library does the packing.
Files with one scheme set `"dequantize": true`; without it, transformers cannot load zero points. Files with several
schemes load only without it, and must therefore be symmetric.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.errors import CheckpointError, NumericalError
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


def stored_linear(codes: Tensor, grid: Grid, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """Pack a linear. codes (out, in) are signed whole numbers in any dtype.

    Returns:
        (the stored tensors by leaf name, the weight (out, in) float32 that readers unpack).

    Raises:
        NumericalError: a code or zero point is outside the scheme's range.
    """
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    from compresskit.numerics.grid import from_codes

    for what, values in (("code", codes), ("zero point", grid.zero_point)):
        if bool((values < scheme.lowest).any()) or bool((values > scheme.highest).any()):
            raise NumericalError(f"a {what} lies outside {scheme.lowest} to {scheme.highest}; this is a bug, please report it")
    found = {
        "weight_packed": pack_to_int32(codes.to(torch.int8), scheme.bits),
        "weight_scale": grid.scale.to(scale_dtype),
        "weight_shape": torch.tensor(codes.shape),
    }
    if not scheme.symmetric:
        zero_points = pack_to_int32(grid.zero_point.to(torch.int8), scheme.bits, packed_dim=0)
        found["weight_zero_point"] = zero_points.contiguous()
    return found, from_codes(codes, grid, scheme, scale_dtype)


def configuration(schemes: Mapping[str, Scheme], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `schemes`: by module name, one per block; `ignored`: dense linears."""
    distinct = list(dict.fromkeys(schemes.values()))
    groups = {}
    for index, scheme in enumerate(distinct):
        targets = ["Linear"] if len(distinct) == 1 else [_pattern([n for n, each in schemes.items() if each == scheme])]
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group_size else "channel",
            "group_size": scheme.group_size or None,
            "dynamic": False,
            "observer": "minmax",
        }
        groups[f"group_{index}"] = {
            "targets": targets, "weights": weights, "input_activations": None, "output_activations": None, "format": FORMAT,
        }  # fmt: skip
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return config | {"dequantize": True} if len(distinct) == 1 else config


def _pattern(names: list[str]) -> str:
    """Build a target pattern for the blocks of these linears, which have one scheme per block."""
    blocks = dict.fromkeys(re.sub(r"(\.\d+)\..*", r"\1", name) for name in names)
    prefix = next(iter(blocks)).rpartition(".")[0]
    return f"re:{re.escape(prefix)}\\.({'|'.join(block.rpartition('.')[2] for block in blocks)})\\..*"


@dataclass(frozen=True)
class PackQuantized:
    """The packed linears of a checkpoint."""

    checkpoint: Checkpoint
    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    """(targets, scheme) of each config group."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PackQuantized:
        """Read the configuration; raises CheckpointError for other formats, and unless codes are integers by group or row."""
        config = checkpoint.config["quantization_config"]
        place = f"{checkpoint.folder / 'config.json'}: quantization_config"
        schemes = []
        for group in (config.get("config_groups") or {}).values():
            stored = group.get("format") or config.get("format")
            weights = group.get("weights") or {}
            if stored != FORMAT or weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel"):
                raise CheckpointError(f"{place}: format {stored!r} with {weights.get('type')} weights; only {FORMAT} is known")
            scheme = Scheme(int(weights["num_bits"]), int(weights.get("group_size") or 0), bool(weights.get("symmetric", True)))
            schemes.append((tuple(group.get("targets") or ()), scheme))
        if not schemes:
            raise CheckpointError(f"{place}: has no config_groups; restore the file from its source")
        return cls(checkpoint, tuple(schemes))

    def holds(self, name: str) -> bool:
        """Whether this linear is packed."""
        return f"{name}.weight_packed" in self.checkpoint.tensors

    def shape(self, name: str) -> tuple[int, int]:
        """(out, in), read from the 16 bytes of `weight_shape`."""
        rows, columns = self.checkpoint.read_numbers(f"{name}.weight_shape")
        return rows, columns

    def bits(self, name: str) -> int:
        """Bits per code."""
        return self.scheme(name).bits

    def stored_tensors(self, name: str) -> list[str]:
        """Stored tensors that make up the weight."""
        return [f"{name}.{leaf}" for leaf in LEAVES if f"{name}.{leaf}" in self.checkpoint.tensors]

    def scheme(self, name: str) -> Scheme:
        """Scheme of a linear, from the first group that targets it; raises CheckpointError if none does."""
        for targets, scheme in self.schemes:
            if any(_targets(target, name) for target in targets):
                return scheme
        raise CheckpointError(f"{self.checkpoint.folder}: {name} is packed, but no config group targets it")

    def read(self, name: str) -> Tensor:
        """Read the weight, (out, in), in its scale's dtype; readers that keep it packed compute in the model's own dtype."""
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

        scheme, shape = self.scheme(name), torch.Size(self.shape(name))
        scale = self.checkpoint.read(f"{name}.weight_scale")
        config = self.checkpoint.config
        if not config["quantization_config"].get("dequantize"):
            scale = scale.to(getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32")))
        codes = unpack_from_int32(self.checkpoint.read(f"{name}.weight_packed"), scheme.bits, shape)
        groups = torch.Size((shape[0], scale.shape[1]))
        zero_point = torch.zeros(groups, dtype=scale.dtype)
        if not scheme.symmetric:
            packed = self.checkpoint.read(f"{name}.weight_zero_point")
            zero_point = unpack_from_int32(packed, scheme.bits, groups, packed_dim=0).to(scale.dtype)
        if f"{name}.weight_g_idx" in self.checkpoint.tensors:  # column groups reordered by activation order
            group_of = self.checkpoint.read(f"{name}.weight_g_idx").long()
            found: Tensor = (codes.to(scale.dtype) - zero_point[:, group_of]) * scale[:, group_of]
            return found
        steps: Tensor = codes.to(scale.dtype).reshape(*groups, -1) - zero_point.unsqueeze(-1)
        return (steps * scale.unsqueeze(-1)).flatten(1)


def _targets(target: str, name: str) -> bool:
    """Whether a config group's target matches this linear: by class, pattern or name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target in ("Linear", name)
