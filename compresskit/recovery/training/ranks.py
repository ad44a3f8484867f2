"""Rank of every block's low-rank update: a fixed total, distributed by the blocks' importances (IG-LoRA).

CFSP, arXiv 2409.13199, section 3.4: more important blocks get a higher rank. Every block gets at least 1. Does not import
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compresskit.checkpoint.manifest import chain
from compresskit.models.model import Model
from compresskit.recovery.budget import split_budget

LARGEST_SHARE = 4
"""Maximum rank of a block relative to the mean: higher ranks train slower and add nothing measurable."""


def block_ranks(rank: int, importances: Sequence[float]) -> list[int]:
    """Ranks with the sum rank * blocks. `importances` by block, at least 0."""
    blocks = len(importances)
    most = [rank * LARGEST_SHARE - 1] * blocks
    return [1 + extra for extra in split_budget(importances, most, (rank - 1) * blocks)]


def known_importances(manifest: dict[str, Any] | None, blocks: int) -> list[float] | None:
    """Block importances measured by an earlier pruning of this model, None if there are none."""
    for link in chain(manifest):
        found = link.get("facts", {}).get("importances")
        if isinstance(found, list) and len(found) == blocks:
            return [max(0.0, float(value)) for value in found]
    return None


def linear_ranks(model: Model, rank: int) -> dict[str, int]:
    """Rank of every linear's pair: the existing adapter's, else by the blocks' importances."""
    if model.adapter is not None:
        return {name: model.adapter.rank(name) for name in model.adapter.names}
    known = known_importances(model.checkpoint.manifest, model.block_count)
    by_block = block_ranks(rank, known or [1.0] * model.block_count)
    return {name: min(by_block[model.block_of(name)], *model.linear_shape(name)) for name in model.linears}


def largest_by_block(model: Model, ranks: Mapping[str, int]) -> list[int]:
    """Largest rank in every block. `ranks`: by plain name of a linear."""
    found = [0] * model.block_count
    for name, rank in ranks.items():
        found[model.block_of(name)] = max(found[model.block_of(name)], rank)
    return found
