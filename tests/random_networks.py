"""Networks of operations drawn at random, and what removing a channel means, by the numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from networks_by_hand import HIDDEN, INNER, linear
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compresskit.models.architectures import Sublayer
from compresskit.numerics.rows import join_rows, split_rows


def rows_of(block: nn.Module, name: str) -> Tensor:
    linear: Any = block.get_submodule(name)
    weight: Tensor = linear.weight
    return weight.T if isinstance(linear, Conv1D) else weight


def without_channel(block: nn.Module, ffn: Sublayer, channel: int) -> nn.Module:
    """The block with narrower linears."""
    block = copy.deepcopy(block)
    width = rows_of(block, ffn.out_projection).shape[1]
    kept = [index for index in range(width) if index != channel]
    for name in ffn.in_projections:
        old: Any = block.get_submodule(name)
        weight, bias = (
            join_rows([part[kept] for part in split_rows(each, ffn.fused, ffn.interleaved)], ffn.interleaved)
            for each in (rows_of(block, name), old.bias)
        )
        block.set_submodule(name, filled(weight, bias))
    out: Any = block.get_submodule(ffn.out_projection)
    block.set_submodule(ffn.out_projection, filled(rows_of(block, ffn.out_projection)[:, kept], out.bias))
    return block


def filled(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = linear(weight.shape[1], weight.shape[0]).to(weight)
    made.weight.data, made.bias.data = weight, bias
    return made


def removing_is_zeroing(block: nn.Module, ffn: Sublayer, channel: int) -> bool:
    """Whether a narrower block gives what the block gives whose output linear ignores the channel."""
    block = block.double()
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    zeroed = copy.deepcopy(block)
    rows_of(zeroed, ffn.out_projection)[:, channel] = 0
    try:
        found = without_channel(block, ffn, channel)(x)
    except (RuntimeError, IndexError):  # a part of the network has the old width
        return False
    return bool(torch.allclose(found, zeroed(x), rtol=1e-9, atol=1e-9))


class Random(nn.Module):
    """Operations drawn at random between two linears and a third."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.names = linear(), linear(), linear(INNER, HIDDEN), names
        self.vector = nn.Parameter(torch.randn(INNER))

    def forward(self, x: Tensor) -> Any:
        h, g = functional.silu(self.up(x)), self.gate(x)
        for name in self.names:
            h = OPERATIONS[name](h, g, self.vector)
        return self.down(h)


def set_first(h: Tensor, g: Tensor) -> Tensor:
    h[..., 0] = g.sum(-1)
    return h


def set_half(h: Tensor, g: Tensor) -> Tensor:
    h[..., : h.shape[-1] // 2] = g.chunk(2, -1)[1]
    return h


def scale_half(h: Tensor, g: Tensor) -> Tensor:
    h.chunk(2, -1)[0].mul_(g.chunk(2, -1)[1])
    return h


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "silu": lambda h, g, v: functional.silu(h),
    "gate": lambda h, g, v: h * g.sigmoid(),
    "add": lambda h, g, v: h + g,
    "square": lambda h, g, v: h * h,
    "scale": lambda h, g, v: 3 * h - 1,
    "clamp in place": lambda h, g, v: h.clone().clamp_(max=1),
    "greatest of tokens": lambda h, g, v: h * g[:, :1],
    "vector": lambda h, g, v: h * v,
    "reversed": lambda h, g, v: h.flip(-1),
    "reversed gate": lambda h, g, v: h * g.flip(-1),
    "indexed": lambda h, g, v: h[..., torch.arange(h.shape[-1]).flip(0)],
    "indexed tokens": lambda h, g, v: h[:, torch.arange(h.shape[1]).flip(0)],
    "rolled": lambda h, g, v: h.roll(1, -1),
    "mean": lambda h, g, v: h - h.mean(-1, keepdim=True),
    "mean of the gate": lambda h, g, v: h * g.mean(-1, keepdim=True),
    "first": lambda h, g, v: h * h[..., :1],
    "first of the gate": lambda h, g, v: h * g[..., 0].unsqueeze(-1),
    "summed up": lambda h, g, v: h.cumsum(-1),
    "normed": lambda h, g, v: functional.layer_norm(h, h.shape[-1:]),
    "softmax": lambda h, g, v: h.softmax(-1),
    "halves swapped": lambda h, g, v: torch.cat(h.chunk(2, -1)[::-1], -1),
    "flattened": lambda h, g, v: h.flatten(0, 1).view(h.shape),
    "turned": lambda h, g, v: h.transpose(1, 2).relu().transpose(1, 2),
    "turned for good": lambda h, g, v: h.transpose(1, 2).reshape(h.shape),
    "product": lambda h, g, v: h * (h @ g.transpose(1, 2)).mean(-1, keepdim=True),
    "first set": lambda h, g, v: set_first(h.clone(), g),
    "half set": lambda h, g, v: set_half(h.clone(), g),
    "half scaled in place": lambda h, g, v: scale_half(h.clone(), g),
}  # fmt: skip
