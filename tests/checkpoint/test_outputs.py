"""checkpoint/outputs.py: shards follow the plan. Property test."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compresskit.checkpoint.outputs import layout_shards
from compresskit.checkpoint.reader import TensorSpec


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30), st.integers(1, 120))
def test_shards_keep_the_order_and_the_limit(lengths: list[int], limit: int) -> None:
    plan = [TensorSpec(str(i), "I8", (n,)) for i, n in enumerate(lengths)]
    shards = layout_shards(plan, limit)
    assert [name for shard in shards for name in shard.offsets] == [spec.name for spec in plan]
    for shard in shards:
        payload = shard.size - len(shard.header)
        assert payload <= limit or len(shard.offsets) == 1 or all(lengths[int(n)] == 0 for n in list(shard.offsets)[1:])
        assert len(shard.header) % 8 == 0
