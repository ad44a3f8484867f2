"""recovery/training/sharing.py: the gradients of all micro-batches, in their order. Oracle: autograd's own sums.

That ranks compute the bytes of one is tested in test_distributed.py.
"""

from __future__ import annotations

import pytest
import torch

from compresskit import distributed
from compresskit.recovery.training.sharing import SharedGradients


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,), (2,))]


def backpropagate(among: list[torch.nn.Parameter], number: int) -> None:
    """The last parameter is reached by no micro-batch, the second by every other one."""
    reached = among[:2] if number % 2 else among[:1]
    sum((number * each.square()).sum() for each in reached).backward()  # type: ignore[union-attr]


def test_alone_autograd_adds() -> None:
    found, expected = parameters(), parameters()
    gradients = SharedGradients(found)
    for number in range(3):
        backpropagate(found, number)
        gradients.add(1)
        backpropagate(expected, number)
    gradients.set()
    assert all(torch.equal(each.grad, other.grad) for each, other in zip(found[:2], expected[:2], strict=True))  # type: ignore[arg-type]
    assert found[2].grad is None


def test_two_ranks_have_the_sums_of_one_and_leave_out_what_no_micro_batch_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks are played one after the other: the rows that the second sends are noted, the first adds them."""
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(distributed, "count", lambda: 2)
    monkeypatch.setattr(distributed, "add_everywhere", lambda total, value, together: sent.append(value.clone()))
    second = parameters()
    gradients = SharedGradients(second)
    for number in (1, 3):
        backpropagate(second, number)
        gradients.add(2)
    monkeypatch.setattr(distributed, "add_everywhere", lambda total, value, together: total.add_(value).add_(sent.pop(0)))
    first, expected = parameters(), parameters()
    gradients = SharedGradients(first)
    for number in (0, 2):
        backpropagate(first, number)
        gradients.add(2)
    gradients.set()
    for number in range(4):
        backpropagate(expected, number)
    assert all(torch.equal(each.grad, other.grad) for each, other in zip(first[:2], expected[:2], strict=True))  # type: ignore[arg-type]
    assert first[2].grad is None
