"""pruning/experts/grouping.py: who stays, by definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compresskit.pruning.experts.grouping import best


@given(st.data(), st.sampled_from([1, 2, 4]), st.integers(1, 4))
def test_as_many_of_each_group_and_none_that_goes_is_better(data: st.DataObject, groups: int, size: int) -> None:
    scores = data.draw(st.lists(st.integers(0, 3).map(float), min_size=groups * size, max_size=groups * size))
    each = data.draw(st.integers(1, size))
    kept = best(scores, groups * each, groups)
    assert kept == sorted(set(kept)) and len(kept) == groups * each
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        stay, go = [e for e in members if e in kept], [e for e in members if e not in kept]
        assert len(stay) == each
        assert all((scores[a], -a) > (scores[b], -b) for a in stay for b in go)
