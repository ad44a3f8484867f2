"""Balanced pairs and restored tensors, against their definitions (property)."""

from __future__ import annotations

import pytest
import torch

from compresskit.numerics.lowrank import balanced_factors
from compresskit.task_vectors.vector import pair_of


@pytest.mark.parametrize(("rows", "columns", "rank"), [(20, 30, 4), (30, 20, 8), (5, 40, 8), (8, 3, 6)])
def test_a_balanced_pair_is_the_same_update_with_equal_parts(rows: int, columns: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    first, second = torch.randn(rank, columns, generator=generator), 0.01 * torch.randn(rows, rank, generator=generator)
    new_first, new_second = balanced_factors(first.double(), second.double())
    assert new_first.shape == first.shape
    assert new_second.shape == second.shape
    torch.testing.assert_close(new_second @ new_first, second.double() @ first.double())
    torch.testing.assert_close(new_first.square().sum(dim=1), new_second.square().sum(dim=0))


def test_a_pair_that_changes_nothing_balances_to_zeros() -> None:
    first, second = balanced_factors(torch.randn(4, 10), torch.zeros(12, 4))
    assert not (second @ first).any()
    assert first.isfinite().all()


def test_the_parts_of_a_pair_know_each_other() -> None:
    names = ("m.lora_A.weight", "m.lora_B.weight")
    assert pair_of(names[0]) == pair_of(names[1]) == names
    assert pair_of("m.ia3_l") is None
