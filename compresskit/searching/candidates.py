"""The options of every unit: bits and group sizes, smallest first, and the exact bytes that each is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compresskit.formats import compressed_tensors
from compresskit.models.model import Model
from compresskit.models.units import units_of
from compresskit.numerics.scheme import Scheme

FEW_BITS = 5
"""From here on only the largest groups: more scales cost bytes and gain nothing that the predictions show."""


@dataclass(frozen=True)
class Unit:
    """One unit and its options."""

    name: str
    block: int
    linears: tuple[str, ...]
    """Plain names."""
    weights: int
    schemes: tuple[Scheme, ...]
    sizes: tuple[int, ...]
    """Bytes of the unit's stored tensors under each scheme; rising."""


def candidates(
    model: Model, chosen: Sequence[str], levels: Sequence[int], group_sizes: Sequence[int], scale_dtype: str
) -> list[Unit]:
    """The units of the chosen linears, with a scheme for each level and each group size that divides the unit's inputs.

    Where no group size divides them, a scale holds for a whole row.

    Returns:
        The units, in the order of the computation.
    """
    found = []
    for name, linears in units_of(model, set(chosen)).items():
        shapes = [model.linear_shape(linear) for linear in linears]
        columns = shapes[0][1]
        fitting = sorted((size for size in group_sizes if columns % size == 0), reverse=True) or [0]
        schemes = [Scheme(bits, size, True) for bits in levels for size in (fitting if bits < FEW_BITS else fitting[:1])]
        sized = sorted((stored_bytes(model, linears, scheme, scale_dtype), scheme.bits, scheme) for scheme in schemes)
        weights = sum(rows * columns for rows, columns in shapes)
        block = model.block_of(linears[0])
        found.append(Unit(name, block, linears, weights, tuple(s for *_, s in sized), tuple(size for size, *_ in sized)))
    return found


def stored_bytes(model: Model, linears: Sequence[str], scheme: Scheme, scale_dtype: str) -> int:
    """Bytes of the stored tensors of some linears under one scheme; `scale_dtype` as safetensors names it."""
    tensors = (compressed_tensors.tensor_specs(name, model.linear_shape(name), scheme, scale_dtype) for name in linears)
    return sum(spec.bytes for specs in tensors for spec in specs)
