"""calibration/drawn_labels.py: the gradients' second moments are the closed-form Fisher information of a softmax. Oracle."""

from __future__ import annotations

import torch

from compresskit.calibration.drawn_labels import drawn_loss

LENGTH = 20_000


def gradient(logits: torch.Tensor, tokens: torch.Tensor, seed: int, unpredicted: list[int] | None = None) -> torch.Tensor:
    """Gradient of the loss at the logits of one window, (length, vocabulary)."""
    given = logits.clone().requires_grad_(True)
    drawn_loss(iter([torch.Generator().manual_seed(seed)]), unpredicted)(tokens, given).backward()
    assert given.grad is not None
    return given.grad[0]


def test_the_mean_square_of_the_gradient_is_the_fisher_information_of_a_softmax() -> None:
    row = torch.tensor([1.5, 0.0, -1.0, 0.5, -3.0])
    found = gradient(row.expand(1, LENGTH, 5), torch.zeros(1, LENGTH, dtype=torch.int64), 0).double()
    p = row.double().softmax(dim=0)
    assert torch.allclose(found.mean(dim=0), torch.zeros(5, dtype=torch.float64), atol=0.02)
    assert torch.allclose(found.T @ found / LENGTH, p.diag() - p.outer(p), atol=0.01)


def test_nothing_is_predicted_before_an_image() -> None:
    tokens = torch.tensor([[4, 9, 9, 4, 9, 4]])
    logits = torch.randn(1, 6, 10, generator=torch.Generator().manual_seed(0))
    found, all_of_it = gradient(logits, tokens, 1, [9]), gradient(logits, tokens, 1)
    skipped = torch.tensor([True, True, False, True, False, False])
    assert not found[skipped].any()
    assert torch.equal(found[~skipped], all_of_it[~skipped])


def test_windows_draw_with_their_own_generators_in_turn() -> None:
    tokens, logits = torch.zeros(1, 40, dtype=torch.int64), torch.zeros(1, 40, 7)
    loss = drawn_loss(torch.Generator().manual_seed(seed) for seed in (1, 2))
    grads = []
    for _ in range(2):
        given = logits.clone().requires_grad_(True)
        loss(tokens, given).backward()
        assert given.grad is not None
        grads.append(given.grad[0])
    assert torch.equal(grads[0], gradient(logits, tokens, 1))
    assert torch.equal(grads[1], gradient(logits, tokens, 2))
