"""A network of a few blocks, written by hand, and what a run without values shows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from compresskit.models.derivation import BlockTrace
from compresskit.models.tracing import kinds_of, make_fake, traced

FILE = Path("config.json")
HIDDEN, INNER = 8, 12


class Block(nn.Module):
    """`size` makes another kind of it."""

    def __init__(self, index: int = 0, size: int = INNER) -> None:
        super().__init__()
        self.layer_idx, self.size = index, size
        self.up, self.down = nn.Linear(HIDDEN, size), nn.Linear(size, HIDDEN)

    def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
        return hidden_states + self.down(functional.gelu(self.up(hidden_states)))


class Network(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.embed = nn.Embedding(20, HIDDEN)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        shared: dict[str, Tensor] = {}
        for block in self.blocks:
            out = block(hidden, shared=shared)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


def traces(*blocks: nn.Module, network: type[nn.Module] = Network) -> list[BlockTrace]:
    made: Any = network(*blocks)
    kind_of, first = kinds_of(made.blocks)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        make_fake(made)
        found = traced(made, made.blocks, kind_of, first, FILE)
    assert all("forward" not in vars(block) for block in made.blocks)
    return found
