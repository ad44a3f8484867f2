"""What the formats with a grid of their own do not take, refused before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.formats.fixed import SCHEMES
from compresskit.models.loadable import quantised_linears
from compresskit.models.model import Model


def check_fixed(model: Model, form: str, given: Mapping[str, Any], ignore: Sequence[str]) -> None:
    """Refuse settings and models that a format cannot have. `given`: settings of the grid by field, None where left out.

    Raises:
        RequestError: a setting is one that the format fixes, or a linear does not divide into its blocks.
        UnsupportedArchitecture: the model has experts.
    """
    for name, value in given.items():
        if value is not None and value != "none":
            raise RequestError(f"{_flag(name, value)}: {form} fixes its bits, groups, symmetry and ranges; leave it out")
    if model.architecture.has_experts:
        raise UnsupportedArchitecture(f"{model.family}: stock tools unpack experts of --format packed only")
    chosen, scheme = set(quantised_linears(model, ignore)), SCHEMES[form]
    for index in range(model.block_count):
        for group in (group for position in model.linear_sequence(index) for group in position):
            for name in (name for name in group if name in chosen):
                _check_sides(form, name, model.linear_shape(name), (scheme.rows if len(group) > 1 else 1, scheme.group_size or 1))


def _check_sides(form: str, name: str, shape: tuple[int, int], divisors: tuple[int, int]) -> None:
    """Raise RequestError where a side of a linear (out, in) is no multiple of its block's; readers join linears of one input."""
    for side, size, divisor in zip(("outputs", "inputs"), shape, divisors, strict=True):
        if size % divisor:
            raise RequestError(
                f"--format {form}: {name} has {size} {side}, which do not divide into blocks of {divisor}; pass another format "
                f"(fp8 and int8 take any size), or --ignore {name.rsplit('.', 1)[-1]}"
            )


def _flag(name: str, value: Any) -> str:
    """A setting as it is spelled on the command line."""
    if isinstance(value, bool):
        return f"--{name.replace('_', '-')}" if value else "--asymmetric"
    return f"--{name.replace('_', '-')} {value:g}" if isinstance(value, (int, float)) else f"--{name} {value}"


def check_guide(model: Model, guide: str, groups: int) -> None:
    """Refuse what no guide (guide.py) can do.

    Raises:
        UnsupportedArchitecture: the model has experts, whose tokens in the quantised model are others.
        RequestError: groups of rows without a guide.
    """
    if guide == "none" and groups > 1:
        raise RequestError(f"--guide-groups {groups}: is for --guide fisher; pass that too")
    if guide != "none" and model.architecture.has_experts:
        raise UnsupportedArchitecture(
            f"{model.family}: --guide {guide}: the quantized model sends its experts other tokens; pass --guide none"
        )
