"""walk/row_grams.py: weighted sums against float64, equal weights against the plain ones. Oracle, property tests."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.errors import NumericalError
from compresskit.walk.row_grams import RowGrams, RowWeights
from compresskit.walk.statistics import Gram


@given(st.integers(1, 17), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 99))
def test_each_group_has_the_weighted_sum_of_its_own(features: int, parts: list[int], groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    chunks = [torch.randn(n, features, generator=generator) for n in parts]
    weights = [[torch.rand(n, generator=generator) for n in parts] for _ in range(groups)]
    found = RowGrams("linear", features, [RowWeights(group + 2, each) for group, each in enumerate(weights)])
    for chunk in chunks:
        found.add(chunk)
    x, rows = torch.cat(chunks).double(), [group + 2 for group in range(groups)]
    expected = [x.T @ (torch.cat(each).double()[:, None] * x) for each in weights]
    mean = sum(count * each.diagonal() for count, each in zip(rows, expected, strict=True)) / sum(rows)
    assert torch.allclose(found.squares.double(), torch.as_tensor(mean), atol=1e-4)
    assert found.tokens == sum(parts)
    for group, (count, gram) in enumerate(found.parts(sum(rows))):
        assert count == rows[group]
        assert torch.allclose(gram.matrix().double(), expected[group], atol=1e-4)


def test_weights_of_one_give_the_plain_sums_to_the_bit() -> None:
    chunks = [torch.randn(n, 9, generator=torch.Generator().manual_seed(n)) for n in (3, 8)]
    plain, found = Gram(9), RowGrams("linear", 9, [RowWeights(4, [torch.ones(3), torch.ones(8)])])
    for chunk in chunks:
        plain.add(chunk)
        found.add(chunk)
    ((_, gram),) = found.parts(4)
    assert torch.equal(gram.matrix(), plain.matrix())


def test_other_tokens_than_those_of_the_weights_are_refused() -> None:
    found = RowGrams("model.layers.1.q", 3, [RowWeights(2, [torch.ones(4)])])
    with pytest.raises(NumericalError, match=r"model\.layers\.1\.q: gets 5 tokens, and 4 in the backward pass"):
        found.add(torch.ones(5, 3))
    with pytest.raises(NumericalError, match="--guide none"):
        found.add(torch.ones(4, 3))
