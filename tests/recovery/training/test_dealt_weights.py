"""recovery/training/dealt_weights.py: clipping is torch's, shares are added in the order of the micro-batches. Oracles.

That ranks compute the bytes of one, and go on with another's checkpoint, is tested in test_distributed.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("peft")

from compresskit import distributed
from compresskit.recovery.training.dealt_weights import InOrder, clip


@given(seed=st.integers(0, 99), size=st.sampled_from([1e-3, 1.0, 1e3]))
def test_clipping_is_that_of_torch(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [size * torch.randn(shape, generator=generator) for shape in ((5, 7), (3,), (2, 9))]
    both = [[torch.nn.Parameter(torch.zeros_like(each)) for each in gradients] for _ in range(2)]
    for parameters in both:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        parameters.append(torch.nn.Parameter(torch.zeros(2)))
    assert torch.equal(clip(both[0], 1.0), torch.nn.utils.clip_grad_norm_(both[1], 1.0))
    for found, expected in zip(*both, strict=True):
        assert (found.grad is None) == (expected.grad is None)
        assert found.grad is None or torch.equal(found.grad, expected.grad)  # type: ignore[arg-type]


def test_shares_are_added_in_the_order_of_the_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 1 + 1e8 - 1e8 + 1 is 1 from left to right, and 2 or 0 in other orders."""
    monkeypatch.setattr(distributed, "count", lambda: 2)
    passes = iter([torch.tensor([1.0, 1e8]), torch.tensor([-1e8, 1.0])])
    monkeypatch.setattr(distributed, "swapped", lambda row: next(passes))
    adding, share = InOrder(), torch.empty(1)
    for expected in (1e8, 1.0):
        adding(share, torch.empty(2))
        assert share.item() == expected
