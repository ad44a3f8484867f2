"""A block's linears in the order in which they compute: statistics of their inputs, and new weights.

`Model.linear_sequence` gives four positions: attention inputs, attention output, feed-forward inputs, feed-forward outputs.
A method that edits one position before it looks at the next sees what the block has become.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import Tensor, nn

from compresskit.checkpoint.writer import Writer
from compresskit.models.model import Model
from compresskit.walk.block import Block
from compresskit.walk.statistics import Gram

ATTENTION_POSITIONS = 2
"""The first positions of `Model.linear_sequence`; after them the attention's outputs are final."""
OnBlock = Callable[[str, int, int], None]
"""Called with what is done, how many blocks are done, and how many there are."""


def chosen_sequence(model: Model, index: int, chosen: Container[str]) -> list[list[tuple[str, ...]]]:
    """Stages of block `index` with the chosen linears alone, as `Model.linear_sequence` gives them; empty groups fall away."""
    kept = [[tuple(name for name in group if name in chosen) for group in position] for position in model.linear_sequence(index)]
    return [[group for group in position if group] for position in kept]


def finish_block(model: Model, block: Block, writer: Writer, facts: dict[str, Any]) -> None:
    """Copy what of this block was not edited, and note that all of it is on the disk."""
    writer.copy_missing(model.checkpoint, model.stored_name(block.name + "."))
    writer.finish_block(block.index, facts)


def collected(groups: Sequence[tuple[str, ...]], block: Block, attention_is_final: bool) -> dict[str, Gram]:
    """Second moments of the input of every group of linears that share theirs, by the name of the group's first linear."""
    inputs = [block.linear(group[0]) for group in groups]
    grams = {group[0]: Gram(each.in_features, each.weight.device) for group, each in zip(groups, inputs, strict=True)}
    block.collect(grams, attention_is_final)
    return grams


def replace_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Give a linear another weight of the same shape, in the dtype in which the block computes."""
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
