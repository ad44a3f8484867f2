"""Visit a block's linears in compute order: collect statistics of their inputs and replace their weights.

`Model.linear_sequence` has positions, in a transformer's block four: attention inputs, attention output, feed-forward
inputs, feed-forward outputs. A method that edits one position before it reads the next sees the edited block.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from torch import Tensor, nn

from compresskit.checkpoint.writer import Writer
from compresskit.models.model import Model
from compresskit.walk.block import Block
from compresskit.walk.statistics import Gram

OnBlock = Callable[[str, int, int], None]
"""Called with the current activity, the number of finished blocks and the total."""


def chosen_sequence(model: Model, index: int, chosen: Container[str]) -> list[list[tuple[str, ...]]]:
    """`Model.linear_sequence` of block `index`, restricted to the chosen linears; empty groups are dropped."""
    kept = [[tuple(name for name in group if name in chosen) for group in position] for position in model.linear_sequence(index)]
    return [[group for group in position if group] for position in kept]


def finish_block(model: Model, block: Block, writer: Writer, facts: dict[str, Any]) -> None:
    """Copy the block's unedited tensors and record that the block is complete on disk."""
    writer.copy_missing(model.checkpoint, f"{model.stored_blocks}{block.index}.")
    writer.finish_block(block.index, facts)


def collected(
    groups: Sequence[tuple[str, ...]], block: Block, attention_is_final: bool, only_these_change: bool = False
) -> dict[str, Gram]:
    """Second moments of the inputs of every group of linears with shared inputs, keyed by the group's first linear.

    `only_these_change`: no other weight of the block does before its next run.

    Returns:
        Sums over this block's inputs.
    """
    inputs = [block.linear(group[0]) for group in groups]
    grams = {group[0]: Gram(each.in_features, each.weight.device) for group, each in zip(groups, inputs, strict=True)}
    block.collect(grams, attention_is_final, only_these_change and [len(group) for group in groups] == [1])
    return grams


def replace_weight(linear: nn.Linear, weight: Tensor) -> None:
    """Replace a linear's weight with one of the same shape, in the block's compute dtype."""
    linear.weight = nn.Parameter(weight.to(linear.weight), requires_grad=False)
