"""Formats that fix their grid: their schemes, and the file that writes and reads each.

fp8         E4M3, a scale for each output                              formats/eight_bits.py
fp8-block   E4M3, a scale for each block of 128 x 128
int8        whole numbers of 8 bits, a scale for each output
nvfp4       E2M1, an E4M3 scale for 16 inputs, a divisor for all       formats/four_bit_floats.py
mxfp4       E2M1, an E8M0 scale for 32 inputs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import RequestError
from compresskit.numerics.fixed_scheme import Activations, FixedScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.numerics.grid import Grid

SCHEMES = {
    "fp8": FixedScheme(8, 0, True, "fp8", "e4m3"),
    "fp8-block": FixedScheme(8, 128, True, "fp8-block", "e4m3", rows=128),
    "int8": FixedScheme(8, 0, True, "int8", "int8"),
    "nvfp4": FixedScheme(4, 16, True, "nvfp4", "e2m1"),
    "mxfp4": FixedScheme(4, 32, True, "mxfp4", "e2m1"),
}
ACTIVATIONS: Mapping[str, tuple[Activations, ...]] = {
    "fp8": ("dynamic", "static"),
    "fp8-block": ("dynamic",),
    "int8": ("dynamic",),
    "nvfp4": ("none", "dynamic"),
    "mxfp4": ("none", "dynamic"),
}
"""What readers may do with the activations, the default first."""
CACHE_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
"""Keys and values in E4M3, with a scale for all of a block's keys and one for its values."""
READ_AS_DENSE = ("fp8", "fp8-block")
"""Formats that count as dense models in 8 bits (stored_forms.py): every stage takes them."""


class FixedFormat(Protocol):
    """A file that writes fixed formats. `scheme` says which one."""

    def tensor_specs(self, name: str, shape: tuple[int, int], scheme: FixedScheme, scale_dtype: str) -> list[TensorSpec]:
        """Stored tensors of one linear (out, in); `name` without `.weight`, `scale_dtype` as safetensors names it."""

    def grids(self, weights: Sequence[Tensor], scheme: FixedScheme, scale_dtype: torch.dtype) -> list[Grid]:
        """The grids of linears (out, in) with a shared input, each scale rounded as it will be stored."""

    def stored_linear(
        self, codes: Tensor, grid: Grid, scheme: FixedScheme, scale_dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(the stored tensors by leaf name, the weight (out, in) float32 that readers unpack) of codes (out, in)."""

    def arguments(self, scheme: FixedScheme) -> tuple[str, dict[str, Any], dict[str, Any] | None]:
        """(compressed-tensors' name of the format, its arguments of the weights, those of the activations)."""


def fixed_format(name: str) -> FixedFormat:
    """The file of a format."""
    module = "eight_bits" if SCHEMES[name].bits == 8 else "four_bit_floats"
    return cast(FixedFormat, import_module(f"compresskit.formats.{module}"))


def fixed_scheme(name: str, activations: Activations | None) -> FixedScheme:
    """The scheme of a format; raises RequestError if its schema has no such activations."""
    known = ACTIVATIONS[name]
    if activations is not None and activations not in known:
        raise RequestError(
            f"--activations {activations}: {name} has {' or '.join(known)}; pass one of these, or leave it out for the first"
        )
    scheme = SCHEMES[name]
    return FixedScheme(**{**vars(scheme), "activations": activations or known[0]})


def configuration(scheme: FixedScheme, ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. `ignored`: dense linears.

    transformers makes dense weights on loading (`dequantize`), so that peft can attach and activations stay as they are;
    vLLM ignores that key and rounds activations.

    Returns:
        The dictionary, with one config group for all linears.
    """
    form, weights, inputs = fixed_format(scheme.format).arguments(scheme)
    fixed = {"symmetric": True, "dynamic": False}
    group = {
        "targets": ["Linear"], "weights": fixed | weights, "input_activations": {"symmetric": True} | inputs if inputs else None,
        "output_activations": None, "format": form,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "dequantize": True,
    }
