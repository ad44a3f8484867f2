"""Interface of quantization methods: the stored form of linears or of whole blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import RequestError
from compresskit.formats import compressed_tensors
from compresskit.models.loadable import check_loadable, quantised_linears
from compresskit.models.model import Model
from compresskit.numerics.packed import QuantizedBlock, QuantizedLinear, Storage
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.for_client import ForClient

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.walk.block import Block
    from compresskit.walk.statistics import Gram

DEFAULT_GROUPS = (64, 32, 16, 8, 4, 2, 1)
"""Default group sizes, in order of preference."""
MOST_BITS = 8
SMALLEST_USEFUL_GROUP = 8
"""Smaller groups cost at least 2 bits per weight for their 16-bit scales."""


class QuantizeMethod(ForClient):
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

    def check(self, model: Model) -> None:
        """Refuse models whose result stock tools could not load, before any work."""

    def scheme(self, model: Model) -> Scheme | None:
        """Grid of every linear; None for methods with their own format."""
        raise TypeError(f"{type(self).__name__} defines no scheme")

    def tensor_specs(self, name: str, shape: tuple[int, int], scheme: Scheme | None, scale_dtype: str) -> list[TensorSpec]:
        """Stored tensors of the linear (out, in) with this stored name."""
        raise TypeError(f"{type(self).__name__} defines no tensor_specs")

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


class GridMethod(QuantizeMethod):
    """Quantisation on an affine grid for groups of inputs, stored as compressed-tensors `pack-quantized`."""

    bits: Annotated[float, Field(ge=2, le=8)] = 4
    """Bits per weight, 2 to 8; an average such as 2.5 gives each block its own bits (mixed precision)."""
    group_size: Annotated[int, Field(ge=0)] | None = None
    """Group size: inputs per scale, 0 for a whole row; default: 64, or the largest smaller power of two that divides all."""
    symmetric: Annotated[bool | None, Field(json_schema_extra={"off": "--asymmetric"})] = None
    """Use no zero points; default: only where stock tools cannot read them (mixed precision, experts)."""

    @property
    def levels(self) -> tuple[int, ...]:
        """Bits that blocks may have: the requested ones, or for an average the ones around it and one more."""
        lower, upper = math.floor(self.bits), math.ceil(self.bits)
        return (lower,) if lower == upper else tuple(bits for bits in (lower, upper, upper + 1) if bits <= MOST_BITS)

    @property
    def mixed(self) -> bool:
        """Whether blocks have different bits."""
        return len(self.levels) > 1

    def is_symmetric(self, model: Model) -> bool:
        """Whether the grid has no zero points."""
        return self.mixed or model.architecture.has_experts if self.symmetric is None else self.symmetric

    def check(self, model: Model) -> None:
        """Refuse models whose result stock tools could not load, before any work.

        Raises:
            UnsupportedArchitecture: stock tools cannot unpack this family's linears.
            RequestError: mixed precision is combined with zero points.
        """
        check_loadable(model, self.ignore, self.bits, self.is_symmetric(model))

    def scheme(self, model: Model) -> Scheme:
        """Grid of every linear; raises RequestError if the group size does not divide a linear's inputs."""
        return checked_scheme(model, self.scheme_of(model, math.ceil(self.bits)), self.ignore)

    def scheme_of(self, model: Model, bits: int) -> Scheme:
        """Grid with this number of bits."""
        return Scheme(bits, self._group_size(model), self.is_symmetric(model))

    def _group_size(self, model: Model) -> int:
        if self.group_size is not None:
            return self.group_size
        widths = {model.linear_shape(name)[1] for name in quantised_linears(model, self.ignore)}
        return max(size for size in DEFAULT_GROUPS if all(width % size == 0 for width in widths))

    def tensor_specs(self, name: str, shape: tuple[int, int], scheme: Scheme | None, scale_dtype: str) -> list[TensorSpec]:
        """Packed tensors of the linear (out, in) with this stored name."""
        assert scheme is not None
        return compressed_tensors.tensor_specs(name, shape, scheme, scale_dtype)

    def configuration(self, schemes: Mapping[str, Scheme | None], dense: list[str], dtype: str) -> dict[str, Any]:
        """`quantization_config` of pack-quantized files."""
        return compressed_tensors.configuration({n: s for n, s in schemes.items() if s is not None}, dense)


class BlockMethod(GridMethod):
    """Quantisation that trains whole blocks on two streams of hidden states, with an optional adapter."""

    trains_blocks: ClassVar[bool] = True

    @property
    def needs_fisher(self) -> bool:
        """Whether the method needs the Fisher diagonals of the weights."""
        return False

    @property
    def training_epochs(self) -> float:
        """Passes over every window in the training of a block."""
        return 1.0

    @property
    def windows_at_once(self) -> int:
        """Maximum number of calibration windows in a micro-batch."""
        raise TypeError(f"{type(self).__name__} defines no windows_at_once")

    def adapter_rank(self, model: Model) -> int:
        """Rank of the low-rank pair of every linear, 0 for none."""
        raise TypeError(f"{type(self).__name__} defines no adapter_rank")

    @property
    def has_small_factors(self) -> bool:
        """Whether the adapter is stored in 8 bits, with a scale per linear."""
        return False

    def quantize_block(
        self,
        block: Block,
        targets: list[Tensor],
        sequence: Sequence[Sequence[tuple[str, ...]]],
        storage: Storage,
        saliencies: Mapping[str, Tensor],
    ) -> QuantizedBlock:
        """Quantise one block of the quantised stream and advance it.

        `targets`: the original block's outputs, one (batch, length, hidden) per micro-batch. `sequence`: the linears to quantise,
        as `Model.linear_sequence` gives them. `saliencies`: by plain name, (out, in) each, if the method needs them.

        Raises:
            TypeError: the method does not implement it.
        """
        raise TypeError(f"{type(self).__name__} defines no quantize_block")


def checked_scheme(model: Model, scheme: Scheme, ignore: Sequence[str]) -> Scheme:
    """Return the scheme; raises RequestError if a linear does not divide into its groups."""
    for name in quantised_linears(model, ignore):
        columns = model.linear_shape(name)[1]
        if not scheme.fits(columns):
            fitting = [size for size in DEFAULT_GROUPS if columns % size == 0 and size >= SMALLEST_USEFUL_GROUP]
            advice = f"use {' or '.join(map(str, fitting))}" if fitting else "use 0, a group a row"
            raise RequestError(
                f"--group-size {scheme.group_size}: {name} has {columns} inputs, which do not divide into such groups; "
                f"{advice}, or --ignore {name.rsplit('.', 1)[-1]}"
            )
    return scheme
