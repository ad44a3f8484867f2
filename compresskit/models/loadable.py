"""Which models stock tools can load with packed linears; all others are refused before any work."""

from __future__ import annotations

from collections.abc import Sequence

from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.models.architectures import REPLACED_EXPERTS
from compresskit.models.model import Model, is_expert
from compresskit.numerics.scheme import Scheme

DEFAULT_GROUPS = (64, 32, 16, 8, 4, 2, 1)
"""Default group sizes, in order of preference."""
SMALLEST_USEFUL_GROUP = 8
"""Smaller groups cost at least 2 bits per weight for their 16-bit scales."""


def quantised_linears(model: Model, ignore: Sequence[str]) -> list[str]:
    """Plain names of the linears to quantise: all linears of the blocks except ignored ones."""
    return [name for name in model.linears if not any(part in name for part in ignore)]


def check_loadable(model: Model, ignore: Sequence[str], bits: float, symmetric: bool) -> None:
    """Refuse models whose packed linears stock tools cannot unpack. `bits` is a fraction for blocks of different bits.

    Raises:
        UnsupportedArchitecture: stock tools cannot unpack this family's linears.
        RequestError: mixed precision is combined with zero points.
    """
    reason = _reason(model)
    if reason:
        raise UnsupportedArchitecture(f"{model.family}: {reason}")
    experts, mixed = model.architecture.has_experts, bits != int(bits)
    if experts:
        _check_experts(model, ignore)
    if mixed and experts:
        raise UnsupportedArchitecture(f"{model.family}: stock tools unpack experts of one bit width only; pass whole --bits")
    if mixed and not symmetric:
        raise RequestError(
            f"--bits {bits:g} --asymmetric: stock tools read several bit widths only without zero points; "
            "pass --symmetric, or whole bits"
        )
    if experts and not symmetric:
        raise UnsupportedArchitecture(
            f"{model.family}: stock tools unpack the experts' linears only without zero points; pass --symmetric"
        )


def _reason(model: Model) -> str:
    """Why no linear of a model can be packed, and the remedy; "" if they can."""
    architecture = model.architecture
    if architecture.transposed:
        return "its linears are stored transposed, and stock tools unpack no packed ones; use quantize nf4"
    if architecture.converted:
        made = architecture.converted[0][0]
        return f"transformers converts {made} on loading, which it does not beside packed linears; prune it instead"
    if model.family in REPLACED_EXPERTS:
        return f"{REPLACED_EXPERTS[model.family]}; prune it instead"
    return "" if model.linears else "has no linear whose weights can be replaced"


def _check_experts(model: Model, ignore: Sequence[str]) -> None:
    """Refuse to leave some experts dense: transformers joins their linears into one tensor when it unpacks them."""
    chosen = set(quantised_linears(model, ignore))
    left = next((name for name in model.linears if is_expert(name) and name not in chosen), None)
    if left is not None:
        raise UnsupportedArchitecture(
            f"--ignore {' '.join(ignore)}: leaves {left} dense; stock tools unpack all experts or none, ignore others"
        )


def largest_group(model: Model, ignore: Sequence[str]) -> int:
    """The default group size: the first of `DEFAULT_GROUPS` that divides the inputs of every linear."""
    widths = {model.linear_shape(name)[1] for name in quantised_linears(model, ignore)}
    return max(size for size in DEFAULT_GROUPS if all(width % size == 0 for width in widths))


def checked_scheme(model: Model, scheme: Scheme, ignore: Sequence[str]) -> Scheme:
    """Return the scheme; raises RequestError if a linear does not divide into its groups."""
    for name in quantised_linears(model, ignore):
        if not scheme.fits(model.linear_shape(name)[1]):
            raise RequestError(f"--group-size {scheme.group_size}: {unfitting(model, name, scheme.group_size)}")
    return scheme


def unfitting(model: Model, name: str, group_size: int) -> str:
    """Why groups of this size do not fit a linear, and the remedy."""
    columns = model.linear_shape(name)[1]
    fitting = [size for size in DEFAULT_GROUPS if columns % size == 0 and size >= SMALLEST_USEFUL_GROUP]
    advice = f"use {' or '.join(map(str, fitting))}" if fitting else "use 0, a group a row"
    return (
        f"{name} has {columns} inputs, which do not divide into groups of {group_size}; "
        f"{advice}, or --ignore {name.rsplit('.', 1)[-1]}"
    )
