"""Feed-forward networks written by hand, with what is known of each, and the structure that is derived of a block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compresskit.models.architectures import BlockStructure, Sublayer
from compresskit.models.derivation import TOKENS, BlockTrace, Tracer, traced_linears
from compresskit.models.names import StoredNames
from compresskit.models.structure import _block_structure
from compresskit.models.tracing import make_fake

HIDDEN, INNER = 8, 12
Network = Callable[[Tensor], Tensor]


def linear(inputs: int = HIDDEN, outputs: int = INNER, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias)


def trace_of(block: nn.Module) -> BlockTrace:
    """What one run of a block without values shows."""
    block = copy.deepcopy(block)
    trace, tracer = BlockTrace(ran=True, hidden=HIDDEN), Tracer()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        make_fake(block)
        tracer.trace = trace
        with tracer, traced_linears(tracer, block, trace):
            block(torch.empty(1, TOKENS, HIDDEN))
    return trace


def structure_of(block: nn.Module) -> BlockStructure:
    """The structure of a block whose tensors are stored under their own names."""
    names = {f"blocks.0.{name}": f"blocks.0.{name}" for name, _ in block.named_parameters()}
    return _block_structure(block, "blocks.0", trace_of(block), StoredNames(names))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = linear(), linear(), linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.inner(x))

    def inner(self, x: Tensor) -> Tensor:
        found: Tensor = functional.silu(self.gate(x)) * self.up(x)
        return found


class Ungated(nn.Module):
    """down(act(up(x))), the frame of most blocks below."""

    def __init__(self, act: Network = functional.gelu, inner: int = INNER) -> None:
        super().__init__()
        self.up, self.down, self.act = linear(outputs=inner), linear(INNER, HIDDEN), act

    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)))


class Transposed(Ungated):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Conv1D(INNER, HIDDEN), Conv1D(HIDDEN, INNER)


class Both(Ungated):
    """Gate and up in one matrix; `parts` takes them apart."""

    def __init__(self, parts: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__(lambda h: functional.silu(parts(h)[0]) * parts(h)[1], 2 * INNER)


def thirds(h: Tensor) -> Tensor:
    first, second, third = h.chunk(3, dim=-1)
    return first * second.sigmoid() + third


class FlatTokens(Gated):
    def forward(self, x: Tensor) -> Any:
        return self.down(self.inner(x.flatten(0, 1)).unsqueeze(0).transpose(0, 1)).view(x.shape)


class PerToken(Gated):
    """Each token, and the whole, is scaled by a number that does not come from the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return self.down(self.inner(x) * x.mean(dim=-1, keepdim=True) * self.scale)


def gate_up(fused: int = 1, interleaved: bool = False) -> Sublayer:
    return Sublayer(("up",), "down", "", fused, interleaved=interleaved)


ACCEPTED: dict[str, tuple[Callable[[], nn.Module], Sublayer]] = {
    "gated": (Gated, Sublayer(("gate", "up"), "down")),
    "ungated": (Ungated, gate_up()),
    "transposed": (Transposed, gate_up()),
    "one matrix by chunk": (lambda: Both(lambda h: h.chunk(2, dim=-1)), gate_up(2)),
    "one matrix by slices": (lambda: Both(lambda h: (h[..., : h.shape[-1] // 2], h[..., h.shape[-1] // 2 :])), gate_up(2)),
    "alternating rows": (lambda: Both(lambda h: (h[..., ::2], h[..., 1::2])), gate_up(2, interleaved=True)),
    "three in one matrix": (lambda: Ungated(thirds, 3 * INNER), gate_up(3)),
    "clamped, with a residual": (lambda: Ungated(lambda h: h.clamp(-1, 2) + torch.where(h > 0, h, 0.1 * h.exp())), gate_up()),
    "tokens in another shape": (FlatTokens, Sublayer(("gate", "up"), "down")),
    "scaled token by token": (PerToken, Sublayer(("gate", "up"), "down")),
}  # fmt: skip
"""Networks whose channels can be removed, and what is to be found of them."""


class Normed(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(INNER)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.norm(self.inner(x)))


class PerChannel(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(INNER))

    def forward(self, x: Tensor) -> Any:
        return self.down(self.inner(x) * self.scale)


class Mixed(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(INNER, INNER, 3, padding=1, groups=INNER)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.conv(self.inner(x).transpose(1, 2)).transpose(1, 2))


class Leaky(Gated):
    def forward(self, x: Tensor) -> Any:
        h = self.inner(x)
        return self.down(h) + h.mean(dim=-1, keepdim=True)


class ReadTwice(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.side = linear(INNER, HIDDEN)

    def forward(self, x: Tensor) -> Any:
        h = self.inner(x)
        return self.down(h) + self.side(h)


class ReadByKeyword(ReadTwice):
    def forward(self, x: Tensor) -> Any:
        h = self.inner(x)
        return self.down(h) + self.side(input=h)


class ScaledByItself(Gated):
    """By a number that follows from all channels, through a product with a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(INNER, 1))

    def forward(self, x: Tensor) -> Any:
        h = self.inner(x)
        return self.down(h * (h @ self.vector))


class InPlace(Ungated):
    """One half of the channels is changed where it lies, by the other."""

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.up(x))
        first, second = h.chunk(2, dim=-1)
        first.mul_(second)
        return self.down(h)


class Overwritten(Ungated):
    """One half of the channels is replaced by those of another linear."""

    def __init__(self) -> None:
        super().__init__()
        self.other = linear()

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.up(x))
        h[..., : INNER // 2] = self.other(x)[..., INNER // 2 :]
        return self.down(h)


class Replaced(Ungated):
    """All channels are replaced by what no linear gave."""

    def forward(self, x: Tensor) -> Any:
        h = self.act(self.up(x))
        h.copy_(x.sum(dim=-1, keepdim=True).expand(h.shape))
        return self.down(h)


class LowRank(Gated):
    def forward(self, x: Tensor) -> Any:
        return self.down(2 * self.up(x) + self.gate(x))


class Twice(Ungated):
    def forward(self, x: Tensor) -> Any:
        return self.down(self.act(self.up(x)) * self.up(x))


class Bare(Ungated):
    def forward(self, x: Tensor) -> Any:
        return functional.linear(self.act(self.up(x)), self.down.weight, self.down.bias)


def permuted(h: Tensor) -> Tensor:
    return functional.gelu(h)[..., torch.arange(h.shape[-1]).flip(0)]


REJECTED: dict[str, Callable[[], nn.Module]] = {
    "a norm inside": Normed,
    "a parameter for each channel": PerChannel,
    "a convolution of each channel": Mixed,
    "its mean is read, too": Leaky,
    "two linears read it": ReadTwice,
    "another linear reads it, called by keyword": ReadByKeyword,
    "scaled by a product of all": ScaledByItself,
    "scaled by its own length": lambda: Ungated(lambda h: h.relu() * torch.rsqrt(h.pow(2).mean(-1, keepdim=True))),
    "edited in place": InPlace,
    "overwritten in part": Overwritten,
    "overwritten": Replaced,
    "no activation": LowRank,
    "no activation but a constant": lambda: Ungated(lambda h: 2 * h / 3 + 1),
    "called twice": Twice,
    "called as a function": Bare,
    "a softmax": lambda: Ungated(lambda h: h.softmax(-1)),
    "the strongest alone": lambda: Ungated(lambda h: h.relu() * (h >= h.topk(2, dim=-1).values[..., 1:])),
    "backwards": lambda: Ungated(lambda h: functional.gelu(h).flip(-1)),
    "backwards by index": lambda: Ungated(permuted),
    "heads": lambda: Ungated(lambda h: functional.silu(h).view(1, -1, 3, INNER // 3).transpose(-1, -2).flatten(-2)),
    "unequal parts": lambda: Ungated(lambda h: functional.silu(h[..., :INNER]) * h[..., 1:], INNER + 1),
    "one of two parts": lambda: Ungated(lambda h: functional.silu(h[..., :INNER]), 2 * INNER),
    "one part twice": lambda: Ungated(lambda h: functional.silu(h[..., :INNER]) * h[..., :INNER], 2 * INNER),
}  # fmt: skip
"""Blocks of whose channels none can be removed, or of which nothing shows that they can."""
