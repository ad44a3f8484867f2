"""Experts with random weights outside any model, and tokens that are sent to them."""

from __future__ import annotations

import torch
from torch import nn

from compresskit.models.experts import PlainExperts

COUNT, HIDDEN, WIDTH, CHOSEN = 5, 6, 7, 2


class Stock(nn.Module):
    """What `PlainExperts` asks of the module it replaces."""

    num_experts, has_gate, is_concatenated = COUNT, True, True

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> None: ...

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return torch.tanh(gate) * up


def experts(seed: int = 0, count: int = COUNT) -> PlainExperts:
    """Experts with biases."""
    torch.manual_seed(seed)
    made = PlainExperts(Stock(), count, {"gate_up_proj": nn.Linear(HIDDEN, 2 * WIDTH), "down_proj": nn.Linear(WIDTH, HIDDEN)})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def routed(seed: int, tokens: int, used: int = COUNT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, choices and weights; the experts after the first `used` get no token."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack([torch.randperm(used, generator=generator)[:CHOSEN] for _ in range(tokens)])
    return torch.randn(tokens, HIDDEN, generator=generator), chosen, torch.rand(tokens, CHOSEN, generator=generator)
