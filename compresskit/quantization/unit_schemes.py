"""Grids of their own for the units of a model (models/units.py), its experts or its blocks: what mixed precision stores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from pydantic import Field, field_validator

from compresskit.checkpoint.small_files import read_json
from compresskit.errors import RequestError, UnsupportedArchitecture, near_miss
from compresskit.models.loadable import quantised_linears, unfitting
from compresskit.models.model import Model, is_expert
from compresskit.models.units import units_of
from compresskit.numerics.scheme import Scheme
from compresskit.stages import Method


class UnitScheme(Method):
    """The grid of one unit."""

    bits: Annotated[int, Field(ge=2, le=8)]
    """Bits of its codes, 2 to 8."""
    group_size: Annotated[int, Field(ge=0)] | None = None
    """Inputs per scale, 0 for a whole row; default: the method's."""


class ByUnit(Method):
    """A method whose units may have grids of their own."""

    bits_by: dict[str, UnitScheme] | str | None = None
    """Grids of single units: in a recipe {UNIT: {bits: 3, group_size: 32}}, else a JSON file of that; others have --bits."""
    expert_bits: Annotated[int, Field(ge=2, le=8)] | None = None
    """Bits of the experts of a mixture of experts, 2 to 8; all other linears have --bits. Default: those of --bits too."""

    @field_validator("bits_by", mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """What the file says; the manifest and the fingerprint of a run then hold it too."""
        return read_json(Path(value).expanduser()) if isinstance(value, str) else value

    @property
    def unit_grids(self) -> Mapping[str, UnitScheme]:
        """The grids by unit; empty where there is one for all or one a block."""
        return self.bits_by if isinstance(self.bits_by, dict) else {}


class Gridded(Protocol):
    """What of a method decides grids by unit."""

    @property
    def ignore(self) -> tuple[str, ...]:
        """Parts of the names of linears that stay dense."""

    @property
    def average(self) -> float:
        """Bits per code."""

    @property
    def unit_grids(self) -> Mapping[str, UnitScheme]:
        """The grids by unit."""

    @property
    def expert_bits(self) -> int | None:
        """Bits of experts, None for those of all."""

    def is_symmetric(self, model: Model) -> bool:
        """Whether the grid has no zero points."""

    def scheme_of(self, model: Model, bits: int) -> Scheme:
        """Grid with this number of bits."""


def check_units(method: Gridded, model: Model) -> None:
    """Refuse grids by unit, or of experts, that stock tools could not load or that no linear has.

    Raises:
        UnsupportedArchitecture: the model has experts, and grids by unit.
        RequestError: bits are an average, there are zero points or another format, a name is no unit's, groups do not divide, or
            there are no experts for their own bits.
    """
    if method.expert_bits is not None and not any(is_expert(name) for name in quantised_linears(model, method.ignore)):
        raise RequestError(f"--expert-bits {method.expert_bits}: {model.family} has no experts to quantize; leave it out")
    grids = method.unit_grids
    if not grids:
        return
    if model.architecture.has_experts:
        raise UnsupportedArchitecture(
            f"{model.family}: stock tools unpack experts of one bit width only; pass --expert-bits, not --bits-by"
        )
    if getattr(method, "format", "packed") != "packed":
        raise RequestError("--bits-by: grids by unit are for --format packed; leave one of them out")
    if method.average != int(method.average):
        raise RequestError(f"--bits-by, --bits {method.average:g}: the average would choose bits too; pass whole --bits, or none")
    if not method.is_symmetric(model):
        raise RequestError("--bits-by --asymmetric: stock tools read several grids only without zero points; pass --symmetric")
    units = units_of(model, set(quantised_linears(model, method.ignore)))
    unknown = next((name for name in grids if name not in units), None)
    if unknown is not None:
        raise RequestError(
            f"--bits-by: no unit {unknown!r};{near_miss(unknown, units)} A unit is such as {next(iter(units), '')!r}"
        )
    for unit, names in units.items():
        scheme = unit_scheme(method, model, unit)
        for name in names:
            if not scheme.fits(model.linear_shape(name)[1]):
                raise RequestError(f"--bits-by: {unit}: {unfitting(model, name, scheme.group_size)}")


def unit_scheme(method: Gridded, model: Model, unit: str) -> Scheme:
    """The grid of one unit: its own, or the method's."""
    usual, own = method.scheme_of(model, int(method.average)), method.unit_grids.get(unit)
    if own is None:
        return usual
    return Scheme(own.bits, usual.group_size if own.group_size is None else own.group_size, usual.symmetric)


def mixed_schemes(method: Gridded, model: Model, names: Sequence[str], bits: Sequence[int]) -> dict[str, Scheme | None]:
    """The grid of each linear by plain name: by unit, of experts and others, or by `bits` of the blocks (none: even ones)."""
    if method.unit_grids:
        units = units_of(model, set(names))
        return {name: unit_scheme(method, model, unit) for unit, linears in units.items() for name in linears}
    if method.expert_bits is not None:
        experts, others = (method.scheme_of(model, each) for each in (method.expert_bits, int(method.average)))
        return {name: experts if is_expert(name) else others for name in names}
    chosen = bits or tuple(_even_bits(method.average, index) for index in range(model.block_count))
    of_bits = {each: method.scheme_of(model, each) for each in set(chosen)}
    return {name: of_bits[chosen[model.block_of(name)]] for name in names}


def _even_bits(average: float, block: int) -> int:
    """Whole bits that reach the average over the blocks; which block gets more is measured later."""
    lower = math.floor(average)
    share = average - lower
    return lower + (math.floor((block + 1) * share) > math.floor(block * share))
