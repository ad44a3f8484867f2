"""quantization/apiq/dealing.py: every tensor has one owner and the owners have alike much. Property tests.

That ranks compute the bytes of one is tested in test_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit import distributed
from compresskit.quantization.apiq.dealing import add_gradients, owners_of, turns


@given(sizes=st.dictionaries(st.text(), st.integers(1, 1000), max_size=20), ranks=st.integers(1, 9))
def test_no_rank_trains_more_than_another_by_more_than_one_tensor(sizes: dict[str, int], ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distributed, "count", lambda: ranks)
        owners = owners_of(sizes)
        assert owners == owners_of(dict(reversed(sizes.items())))
        assert list(turns(list(sizes))) == [list(sizes)[start : start + ranks] for start in range(0, len(sizes), ranks)]
    assert set(owners) == set(sizes)
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(ranks)]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_alone_the_sums_are_what_autograd_has_added() -> None:
    reached, unreached = (torch.ones(3, requires_grad=True) for _ in range(2))
    sums: dict[str, torch.Tensor] = {}
    for factor in (2, 3):
        (factor * reached).sum().backward()
        add_gradients({"a": reached, "b": unreached}, {"a": 0, "b": 0}, 1, sums)
    assert list(sums) == ["a"] and sums["a"].tolist() == [5, 5, 5]
