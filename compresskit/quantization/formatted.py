"""Methods that round one linear at a time, and so write every format: packed integers, 8 bits, floats of 4 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import RequestError
from compresskit.formats import compressed_tensors, fixed
from compresskit.models.model import Model
from compresskit.numerics.fixed_scheme import Activations, FixedScheme
from compresskit.numerics.packed import QuantizedLinear
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.format_checks import check_fixed
from compresskit.quantization.method import GridMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.numerics.grid import Grid
    from compresskit.quantization.scaling import Prepare
    from compresskit.walk.block import Block


class FormatMethod(GridMethod):
    """Quantisation of one linear at a time, in any of the formats."""

    format: Literal["packed", "fp8", "fp8-block", "int8", "nvfp4", "mxfp4"] = "packed"
    """Format: packed (whole numbers of --bits), fp8, fp8-block (of 128 x 128), int8, nvfp4 or mxfp4 (4 bits)."""
    activations: Activations | None = None
    """How readers that can round the inputs do so: none, dynamic or static (fp8); by default none in 4 bits, else dynamic."""

    kv_cache: Literal["fp8"] | None = None
    """fp8: store scales with which vLLM keeps keys and values in 8 bits, from calibration."""

    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0
    """Smoothing of int8's activations through the norms before them, 0.5 usual (SmoothQuant); 0 for none."""

    @property
    def needs_text(self) -> bool:
        """Whether calibration text runs through the blocks."""
        return super().needs_text or self.smoothing > 0 or self.kv_cache is not None or self._measures_inputs

    @property
    def _measures_inputs(self) -> bool:
        return self.activations == "static" or (self.format == "nvfp4" and self.activations == "dynamic")

    @property
    def average(self) -> float:
        """Bits per code."""
        return super().average if self.format == "packed" else fixed.SCHEMES[self.format].bits

    @property
    def reads_as_dense(self) -> bool:
        """Whether the result counts as a dense model."""
        return self.format in fixed.READ_AS_DENSE

    def check(self, model: Model) -> None:
        """Check the format's limits too; raises UnsupportedArchitecture or RequestError."""
        super().check(model)
        if self.format != "packed":
            given = {name: getattr(self, name) for name in ("bits", "group_size", "symmetric", "clipping") if hasattr(self, name)}
            check_fixed(model, self.format, given, self.ignore)
        if self.smoothing and self.format != "int8":
            raise RequestError(f"--smoothing {self.smoothing:g}: is for --format int8, whose activations have one step a token")
        if self.smoothing and self.scaling != "none":
            raise RequestError(f"--scaling {self.scaling}: --smoothing scales the same inputs; pass one of them")
        if self.format == "packed" and self.activations is not None:
            raise RequestError("--activations: packed weights come with activations as they are; pass another --format")

    def grid_settings(self, scheme: Scheme | None) -> dict[str, Any]:
        """Bits, group size and symmetry, and what readers do with the inputs."""
        chosen = {"activations": scheme.activations} if isinstance(scheme, FixedScheme) else {}
        return super().grid_settings(scheme) | chosen

    def scheme_of(self, model: Model, bits: int) -> Scheme:
        """The format's own grid; of packed integers, with this number of bits."""
        return super().scheme_of(model, bits) if self.format == "packed" else fixed.fixed_scheme(self.format, self.activations)

    def tensor_specs(self, name: str, shape: tuple[int, int], scheme: Scheme | None, scale_dtype: str) -> list[TensorSpec]:
        """Stored tensors of the linear (out, in) with this stored name."""
        if isinstance(scheme, FixedScheme):
            return fixed.fixed_format(self.format).tensor_specs(name, shape, scheme, scale_dtype)
        return super().tensor_specs(name, shape, scheme, scale_dtype)

    def preparation(self, model: Model, schemes: Mapping[str, Scheme | None], scale_dtype: torch.dtype) -> Prepare:
        """Smooth the activations, or scale the weights."""
        if not self.smoothing:
            return super().preparation(model, schemes, scale_dtype)
        from compresskit.quantization.smoothing import smooth

        return lambda block: (smooth(model, block, schemes, self.smoothing), {})

    def nearest(self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
        """A weight (out, in) rounded to nearest in the format, float32."""
        if not isinstance(scheme, FixedScheme):
            return super().nearest(weight, scheme, scale_dtype)
        from compresskit.numerics.grid import to_codes

        (grid,) = self.grids([weight], scheme, scale_dtype)
        return self.stored(to_codes(weight, grid, scheme), grid, scheme, scale_dtype, None).weight

    def block_specs(self, model: Model, index: int) -> list[TensorSpec]:
        """Scales of the keys and of the values of one block."""
        mixer = model.architecture.block(index).mixer
        if self.kv_cache is None or not mixer:
            return []
        name = model.stored_name(f"{model.block_name(index)}.{mixer}")
        return [TensorSpec(f"{name}.{leaf}", "F32", (1,)) for leaf in ("k_scale", "v_scale")]

    def block_tensors(self, model: Model, block: Block, schemes: Mapping[str, Scheme | None]) -> dict[str, Tensor]:
        """Scales of the inputs, keys and values, where the format needs them."""
        from compresskit.quantization.activation_scales import block_scales

        if not self._measures_inputs and self.kv_cache is None:
            return {}
        scheme = next(each for each in schemes.values() if each is not None)
        return block_scales(model, block, schemes, scheme, self.kv_cache is not None)

    def leading_tensors(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """None where the shapes of the stored tensors say the linear's."""
        return super().leading_tensors(shape) if self.format == "packed" else {}

    def configuration(self, schemes: Mapping[str, Scheme | None], dense: list[str], dtype: str) -> dict[str, Any]:
        """`quantization_config` of the format's files."""
        scheme = next(iter(schemes.values()))
        if isinstance(scheme, FixedScheme):
            config = fixed.configuration(scheme, dense)
        else:
            config = super().configuration(schemes, dense, dtype)
        return config | {"kv_cache_scheme": fixed.CACHE_SCHEME} if self.kv_cache else config

    def grids(
        self, weights: Sequence[Tensor], scheme: Scheme, scale_dtype: torch.dtype, clipped: Tensor | None = None
    ) -> list[Grid]:
        """The grids of linears (out, in) with a shared input; `clipped`: the inputs' importance (in,), to narrow the ranges."""
        from compresskit.numerics.grid import min_max_grid
        from compresskit.numerics.grid_search import searched_grid

        if isinstance(scheme, FixedScheme):
            return fixed.fixed_format(self.format).grids(weights, scheme, scale_dtype)
        if clipped is None:
            return [min_max_grid(weight, scheme, scale_dtype) for weight in weights]
        return [searched_grid(weight, scheme, scale_dtype, clipped) for weight in weights]

    def stored(self, codes: Tensor, grid: Grid, scheme: Scheme, scale_dtype: torch.dtype, error: float | None) -> QuantizedLinear:
        """Store codes (out, in) in the format."""
        if isinstance(scheme, FixedScheme):
            tensors, weight = fixed.fixed_format(self.format).stored_linear(codes, grid, scheme, scale_dtype)
        else:
            tensors, weight = compressed_tensors.stored_linear(codes, grid, scheme, scale_dtype)
        return QuantizedLinear(tensors, weight, error)
