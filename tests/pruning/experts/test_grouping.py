"""pruning/experts/grouping.py: who stays, by definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from compresskit.pruning.experts.grouping import best, join_nearest, take_nearest


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


def test_every_expert_joins_the_core_that_it_is_most_alike() -> None:
    similarity = [[1.0, 0.2, 0.9, 0.1], [0.2, 1.0, 0.3, 0.1], [0.9, 0.3, 1.0, 0.5], [0.1, 0.1, 0.5, 1.0]]
    assert join_nearest(similarity, [0, 1]) == [[0, 2, 3], [1]]  # 3 is as near to both


def test_the_best_core_takes_first_and_no_more_than_its_share() -> None:
    similarity = [[1.0, 0.2, 0.9, 0.1, 0.8], [0.2, 1.0, 0.3, 0.1, 0.7], *[[0.0] * 5] * 3]
    assert take_nearest([1.0, 2.0, 0.0, 0.0, 0.0], similarity, [0, 1], 2) == [[0, 2], [1, 4]]
    assert take_nearest([1.0, 2.0, 0.0, 0.0, 0.0], similarity, [0, 1], 3) == [[0, 3], [1, 2, 4]]
    assert take_nearest([1.0, 2.0, 0.0, 0.0, 0.0], similarity, [0, 1], 16) == [[0], [1, 2, 3, 4]]
