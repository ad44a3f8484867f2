"""numerics/factorised.py: the same bytes for any number of threads. Property."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compresskit.numerics.factorised import ONE_THREAD_SIDE, in_one_thread

LINALG = torch.linalg
FUNCTIONS = [LINALG.cholesky_ex, LINALG.eigh, LINALG.eigvalsh, LINALG.qr, LINALG.svd, LINALG.inv]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def definite(side: int) -> Tensor:
    values = torch.randn(2 * side, side, generator=torch.Generator().manual_seed(side), dtype=torch.float64)
    return values.T @ values + torch.eye(side, dtype=torch.float64)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_number_of_threads_changes_no_byte_and_stays_as_it_was(function: Callable[..., Any]) -> None:
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        result = in_one_thread(function, definite(300))
        found.append([result] if isinstance(result, Tensor) else list(result))
        assert torch.get_num_threads() == threads
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize(("side", "threads"), [(ONE_THREAD_SIDE, 1), (ONE_THREAD_SIDE + 1, 2)])
def test_a_large_matrix_keeps_all_threads_also_after_an_error(side: int, threads: int) -> None:
    def refused(matrix: Tensor) -> None:
        raise ValueError(torch.get_num_threads())

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match=f"^{threads}$"):
        in_one_thread(refused, torch.empty(2 * side, side, device="meta"))
    assert torch.get_num_threads() == 2
