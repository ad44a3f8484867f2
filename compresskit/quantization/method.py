"""Interface of quantization methods: the stored form of linears or of whole blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from compresskit.checkpoint.reader import TensorSpec
from compresskit.formats import compressed_tensors, packed_configuration
from compresskit.models.loadable import check_loadable, checked_scheme, largest_group
from compresskit.models.model import Model
from compresskit.numerics.packed import QuantizedLinear
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.for_client import ForClient
from compresskit.quantization.scaling import Scaling, Unscaled
from compresskit.quantization.unit_schemes import ByUnit, check_units

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.walk.block import Block
    from compresskit.walk.statistics import Gram

DEFAULT_BITS, MOST_BITS = 4, 8


class QuantizeMethod(Unscaled, ForClient):
    """Store the linears of the blocks in low bits.

    The shared walk (sequential.py) collects the second moments of each linear's inputs on the quantised prefix, passes the
    linears that share an input to the method, and writes the result.
    """

    ignore: tuple[str, ...] = ()
    """Keep linears dense whose names contain this text, such as down or layers.0; may be repeated."""
    embedding_bits: Annotated[int, Field(ge=16, le=16)] | None = None
    """16 stores embedding, head and final norm of a 32-bit source in 16 bits; by default they are unchanged."""

    needs_activations: ClassVar[bool] = False
    """Whether the method needs calibration text."""
    trains_blocks: ClassVar[bool] = False
    """Whether whole blocks are fitted to their outputs, so that single weights may differ from the original's."""

    @property
    def needs_text(self) -> bool:
        """Whether calibration text runs through the blocks."""
        return self.needs_activations or self.scales_inputs

    @property
    def guide_rows(self) -> int:
        """Groups of a linear's rows whose tokens have weights of their own (guide.py); 0 for no guide."""
        return 0

    @property
    def reads_as_dense(self) -> bool:
        """Whether the result counts as a dense model (formats/stored_forms.py)."""
        return False

    def check(self, model: Model) -> None:
        """Refuse models whose result stock tools could not load, before any work."""

    def scheme(self, model: Model) -> Scheme | None:
        """Grid of every linear; None for methods with their own format."""
        raise TypeError(f"{type(self).__name__} defines no scheme")

    def grid_settings(self, scheme: Scheme | None) -> dict[str, Any]:
        """What was chosen for the grid of the linears, by setting."""
        return {}

    def tensor_specs(self, name: str, shape: tuple[int, int], scheme: Scheme | None, scale_dtype: str) -> list[TensorSpec]:
        """Stored tensors of the linear (out, in) with this stored name."""
        raise TypeError(f"{type(self).__name__} defines no tensor_specs")

    def block_specs(self, model: Model, index: int) -> list[TensorSpec]:
        """Stored tensors that belong to a block rather than to a linear."""
        return []

    def block_tensors(self, model: Model, block: Block, schemes: Mapping[str, Scheme | None]) -> dict[str, Tensor]:
        """By stored name what is measured on a block once its linears are quantised."""
        return {}

    def leading_tensors(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        """Stored tensors of a linear (out, in) by leaf, from which readers know its shape before it is quantised."""
        import torch

        return {"weight_shape": torch.tensor(shape)}

    def configuration(self, schemes: Mapping[str, Scheme | None], dense: list[str], dtype: str) -> dict[str, Any]:
        """`quantization_config`. `schemes`: by module name; `dense`: linears that are not quantised."""
        raise TypeError(f"{type(self).__name__} defines no configuration")

    def quantize_group(
        self, weights: Sequence[Tensor], gram: Gram | None, scheme: Scheme | None, scale_dtype: torch.dtype
    ) -> list[QuantizedLinear]:
        """Quantise linears (out, in) with a shared input; `gram` holds its second moments over the calibration text."""
        raise TypeError(f"{type(self).__name__} defines no quantize_group")


class GridMethod(ByUnit, Scaling, QuantizeMethod):
    """Quantisation on an affine grid for groups of inputs, stored as compressed-tensors `pack-quantized`."""

    bits: Annotated[float, Field(ge=2, le=8)] | None = None
    """Bits per weight, 2 to 8, by default 4; an average such as 2.5 gives each block its own bits (mixed precision)."""
    group_size: Annotated[int, Field(ge=0)] | None = None
    """Group size: inputs per scale, 0 for a whole row; default: 64, or the largest smaller power of two that divides all."""
    symmetric: Annotated[bool | None, Field(json_schema_extra={"off": "--asymmetric"})] = None
    """Use no zero points; default: only where stock tools cannot read them (mixed precision, experts)."""

    @property
    def average(self) -> float:
        """Bits per code."""
        return DEFAULT_BITS if self.bits is None else self.bits

    @property
    def levels(self) -> tuple[int, ...]:
        """Bits that blocks may have: the requested ones, or for an average the ones around it and one more."""
        lower, upper = math.floor(self.average), math.ceil(self.average)
        return (lower,) if lower == upper else tuple(bits for bits in (lower, upper, upper + 1) if bits <= MOST_BITS)

    @property
    def mixed(self) -> bool:
        """Whether linears have different grids."""
        return len(self.levels) > 1 or bool(self.unit_grids) or self.expert_bits is not None

    def is_symmetric(self, model: Model) -> bool:
        """Whether the grid has no zero points."""
        return self.mixed or model.architecture.has_experts if self.symmetric is None else self.symmetric

    def check(self, model: Model) -> None:
        """Refuse models whose result stock tools could not load, before any work.

        Raises:
            UnsupportedArchitecture: stock tools cannot unpack this family's linears.
            RequestError: mixed precision is combined with zero points.
        """
        check_loadable(model, self.ignore, self.average, self.is_symmetric(model))
        check_units(self, model)

    def scheme(self, model: Model) -> Scheme:
        """Grid of every linear; raises RequestError if the group size does not divide a linear's inputs."""
        return checked_scheme(model, self.scheme_of(model, math.ceil(self.average)), self.ignore)

    def grid_settings(self, scheme: Scheme | None) -> dict[str, Any]:
        """Bits, group size and symmetry."""
        assert scheme is not None
        return {"bits": self.average, "group_size": scheme.group_size, "symmetric": scheme.symmetric}

    def scheme_of(self, model: Model, bits: int) -> Scheme:
        """Grid with this number of bits."""
        return Scheme(
            bits, largest_group(model, self.ignore) if self.group_size is None else self.group_size, self.is_symmetric(model)
        )

    def tensor_specs(self, name: str, shape: tuple[int, int], scheme: Scheme | None, scale_dtype: str) -> list[TensorSpec]:
        """Packed tensors of the linear (out, in) with this stored name."""
        assert scheme is not None
        return compressed_tensors.tensor_specs(name, shape, scheme, scale_dtype)

    def configuration(self, schemes: Mapping[str, Scheme | None], dense: list[str], dtype: str) -> dict[str, Any]:
        """`quantization_config` of pack-quantized files."""
        return packed_configuration.configuration({n: s for n, s in schemes.items() if s is not None}, dense)
