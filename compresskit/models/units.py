"""Units of a model: the linears of a block that readers fuse into one, and that therefore share one grid.

A unit is named by its block's number and its linears' path in the block, as in `0.attention.q+k+v`. The linears of a unit read
the same input (`Model.linear_sequence`): q, k and v, or gate and up; o and down stand alone.
"""

from __future__ import annotations

from collections.abc import Container

from compresskit.models.model import Model


def units_of(model: Model, chosen: Container[str]) -> dict[str, tuple[str, ...]]:
    """The chosen linears by unit, in the order of the blocks and of the computation.

    Returns:
        Plain names of the linears of each unit, by the unit's name.
    """
    found = {}
    for index in range(model.block_count):
        for position in model.linear_sequence(index):
            for group in position:
                names = tuple(name for name in group if name in chosen)
                if names:
                    found[unit_name(model, index, names)] = names
    return found


def unit_name(model: Model, index: int, names: tuple[str, ...]) -> str:
    """The name of the unit of these linears of block `index`."""
    inner = [name.removeprefix(f"{model.block_name(index)}.") for name in names]
    parent = inner[0].rpartition(".")[0]
    if parent and all(each.rpartition(".")[0] == parent for each in inner):
        return f"{index}.{parent}.{'+'.join(each.rpartition('.')[2] for each in inner)}"
    return f"{index}.{'+'.join(inner)}"
