"""recovery/training/ranks.py: ranks keep their total (property); importances of the chain of manifests (oracle)."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compresskit.recovery.training.ranks import block_ranks, known_importances


@given(st.lists(st.floats(0, 10), min_size=1, max_size=20), st.integers(1, 64))
def test_ranks_keep_their_total_and_no_block_goes_without(importances: list[float], rank: int) -> None:
    ranks = block_ranks(rank, importances)
    assert sum(ranks) == rank * len(importances)
    assert min(ranks) >= 1


def test_importances_come_from_the_pruning_in_the_chain_of_manifests() -> None:
    pruned = {"stage": "prune", "facts": {"importances": [1.0, 3.0]}, "source": None}
    assert known_importances({"stage": "quantize", "facts": {}, "source": pruned}, 2) == [1.0, 3.0]
    assert known_importances(pruned, 3) is None
    assert known_importances(None, 2) is None
