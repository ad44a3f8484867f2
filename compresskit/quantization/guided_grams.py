"""Collect guided second moments (guide.py) in place of the plain ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit.quantization.guide import TokenWeights
from compresskit.walk.block import Block
from compresskit.walk.row_grams import RowGrams, RowWeights
from compresskit.walk.sequence import collected
from compresskit.walk.statistics import Gram


def guided(groups: Sequence[tuple[str, ...]], block: Block, attention_is_final: bool, guide: TokenWeights) -> dict[str, Gram]:
    """Like `collected`, where the linears change alone and nothing else does before the block's next run.

    `guide`: see guide.py; where a linear is not in it, as with no guide at all or where no text runs through it, the second
    moments are the plain ones.

    Returns:
        Sums over this block's inputs by the first linear of each group.
    """
    if not all(name in guide for group in groups for name in group):
        return collected(groups, block, attention_is_final, True)
    grams: dict[str, Gram] = {}
    for group in groups:
        first = block.linear(group[0])
        rows = [part for name in group for part in _row_weights(block.linear(name).out_features, guide[name])]
        grams[group[0]] = RowGrams(group[0], first.in_features, rows, first.weight.device)
    block.collect(grams, attention_is_final, [len(group) for group in groups] == [1])
    return grams


def _row_weights(rows: int, weights: Sequence[Sequence[Tensor]]) -> list[RowWeights]:
    """The weights of each group of the rows, which are cut as the gradients were."""
    sizes = [len(part) for part in torch.arange(rows).tensor_split(len(weights))]
    return [RowWeights(size, group) for size, group in zip(sizes, weights, strict=True)]
