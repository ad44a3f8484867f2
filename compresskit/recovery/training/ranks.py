"""Rank of the low-rank update of every block: a fixed total, dealt by the blocks' importances (IG-LoRA).

CFSP, arXiv 2409.13199, section 3.4: blocks that matter more get more rank. Every block keeps at least 1. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from compresskit.checkpoint.manifest import chain
from compresskit.recovery.budget import split_budget

LARGEST_SHARE = 4
"""No block gets more than this times the mean: ranks beyond it train slower and add nothing measurable."""


def block_ranks(rank: int, importances: Sequence[float]) -> list[int]:
    """Ranks whose sum is rank * blocks. `importances` by block, at least 0."""
    blocks = len(importances)
    most = [rank * LARGEST_SHARE - 1] * blocks
    return [1 + extra for extra in split_budget(importances, most, (rank - 1) * blocks)]


def known_importances(manifest: dict[str, Any] | None, blocks: int) -> list[float] | None:
    """Block importances that a pruning of this model measured, None where there are none."""
    for link in chain(manifest):
        found = link.get("facts", {}).get("importances")
        if isinstance(found, list) and len(found) == blocks:
            return [max(0.0, float(value)) for value in found]
    return None
