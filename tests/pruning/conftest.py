"""Fixtures of the tests of pruning."""

from __future__ import annotations

import pytest
import torch
from feed_forward import HIDDEN, TOKENS, WIDTH, Ffn


@pytest.fixture
def ffn() -> Ffn:
    """The matrices of a small feed-forward network, and the tokens of its last linear."""
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(2))
    return gate, up, torch.randn(HIDDEN, WIDTH, generator=generator), torch.randn(TOKENS, WIDTH, generator=generator)
