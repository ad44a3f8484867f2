"""models/derivation.py: which linears can be edited, in which order, and which channels can be removed.

Oracle: blocks written by hand, each beside what is known of it. Property: in any network that is accepted, removing a channel
gives what zeroing its column gives, also in networks of operations drawn at random.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compresskit.models.architectures import BlockStructure, Sublayer
from compresskit.models.derivation import TOKENS, BlockTrace, Tracer, common_module, ffns_of, is_linear, traced_linears
from compresskit.models.names import StoredNames
from compresskit.models.structure import _block_structure
from compresskit.models.tracing import make_fake
from compresskit.numerics.rows import join_rows, split_rows

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
        return functional.silu(self.gate(x)) * self.up(x)


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
    first, second, third = h.split(h.shape[-1] // 3, dim=-1)
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


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_feed_forward_network_is_found(case: str) -> None:
    make, expected = ACCEPTED[case]
    assert structure_of(make()).ffns == (expected,)


def rows_of(block: nn.Module, name: str) -> Tensor:
    weight: Any = block.get_submodule(name).weight
    return weight.T if isinstance(block.get_submodule(name), Conv1D) else weight


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


@given(st.sampled_from(sorted(ACCEPTED)), st.integers(0, INNER - 1), st.integers(0, 99))
@torch.no_grad()
def test_removing_a_channel_of_an_accepted_network_is_zeroing_it(case: str, channel: int, seed: int) -> None:
    torch.manual_seed(seed)
    make, ffn = ACCEPTED[case]
    assert removing_is_zeroing(make(), ffn, channel)


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
    "heads": lambda: Ungated(lambda h: functional.silu(h).unflatten(-1, (3, -1)).transpose(-1, -2).flatten(-2)),
    "unequal parts": lambda: Ungated(lambda h: functional.silu(h[..., :INNER]) * h[..., 1:], INNER + 1),
    "one of two parts": lambda: Ungated(lambda h: functional.silu(h[..., :INNER]), 2 * INNER),
    "one part twice": lambda: Ungated(lambda h: functional.silu(h[..., :INNER]) * h[..., :INNER], 2 * INNER),
}  # fmt: skip


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_no_plain_network_is_left_alone(case: str) -> None:
    assert structure_of(REJECTED[case]()).ffns == ()


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
    "flattened": lambda h, g, v: h.flatten(0, 1).unflatten(0, h.shape[:2]),
    "turned": lambda h, g, v: h.transpose(1, 2).relu().transpose(1, 2),
    "turned for good": lambda h, g, v: h.transpose(1, 2).reshape(h.shape),
    "product": lambda h, g, v: h * (h @ g.transpose(1, 2)).mean(-1, keepdim=True),
    "first set": lambda h, g, v: set_first(h.clone(), g),
    "half set": lambda h, g, v: set_half(h.clone(), g),
    "half scaled in place": lambda h, g, v: scale_half(h.clone(), g),
}  # fmt: skip


def set_first(h: Tensor, g: Tensor) -> Tensor:
    h[..., 0] = g.sum(-1)
    return h


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=4), st.integers(0, INNER - 1))
@torch.no_grad()
def test_networks_of_random_operations_are_accepted_only_where_removing_is_zeroing(names: list[str], channel: int) -> None:
    torch.manual_seed(channel)
    block = Random(names)
    assert all(removing_is_zeroing(block, ffn, channel) for ffn in structure_of(block).ffns)


def set_half(h: Tensor, g: Tensor) -> Tensor:
    h[..., : h.shape[-1] // 2] = g.chunk(2, -1)[1]
    return h


def scale_half(h: Tensor, g: Tensor) -> Tensor:
    h.chunk(2, -1)[0].mul_(g.chunk(2, -1)[1])
    return h


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(HIDDEN, HIDDEN) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        q, k, v = (each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        return self.o(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Serial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.norm = Attention(), Gated(), nn.RMSNorm(HIDDEN)

    def forward(self, x: Tensor) -> Any:
        x = x + self.attn(self.norm(x))
        return x + self.mlp(self.norm(x))


class Parallel(Serial):
    def forward(self, x: Tensor) -> Any:
        normed = self.norm(x)
        return x + self.attn(normed) + self.mlp(normed)


def test_an_attention_reads_before_it_writes_and_has_no_channels_to_remove() -> None:
    found = structure_of(Attention())
    assert found.positions == ((("q", "k", "v"),), (("o",),)) and found.ffns == ()


@pytest.mark.parametrize("block", [Serial, Parallel])
def test_the_attention_comes_before_the_feed_forward_network(block: type[nn.Module]) -> None:
    found = structure_of(block())
    assert found.positions == (
        (("attn.q", "attn.k", "attn.v"),), (("attn.o",),), (("mlp.gate", "mlp.up"),), (("mlp.down",),),
    )  # fmt: skip
    assert (found.mixer, found.mixer_positions) == ("attn", 2)
    assert found.ffns == (Sublayer(("mlp.gate", "mlp.up"), "mlp.down"),) and found.untouched == ()


class Latent(nn.Module):
    """Queries through a low rank: a linear after a linear after another."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.side, self.o = linear(outputs=4), linear(4, HIDDEN), linear(HIDDEN, HIDDEN), linear(HIDDEN, HIDDEN)
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Any:
        return self.o((self.up(self.norm(self.down(x))) * self.side(x)).softmax(1))


def test_a_linear_comes_after_those_that_its_input_depends_on() -> None:
    assert structure_of(Latent()).positions == ((("down", "side"),), (("up",),), (("o",),))


class Routed(Gated):
    def __init__(self, choose: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.router, self.choose = linear(outputs=4), choose

    def forward(self, x: Tensor) -> Any:
        return self.down(self.inner(x)) * self.choose(self.router(x))


@pytest.mark.parametrize(
    "choose",
    [
        lambda scores: scores.softmax(-1).topk(2).values.sum(-1, keepdim=True),
        lambda scores: (scores.sigmoid() + 1).sort(-1).values[..., -1:],
        lambda scores: scores.argmax(-1, keepdim=True),
        lambda scores: scores.gather(-1, scores.unflatten(-1, (2, 2)).topk(1).indices[..., 0]).sum(-1, keepdim=True),
    ],
)
def test_a_linear_whose_outputs_choose_is_never_edited(choose: Callable[[Tensor], Tensor]) -> None:
    found = structure_of(Routed(choose))
    assert dict(found.untouched) == {"router": "routes tokens"}
    assert found.positions == ((("gate", "up"),), (("down",),))
    assert found.ffns == (Sublayer(("gate", "up"), "down"),)


class Weighed(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.router = linear(outputs=1)

    def forward(self, x: Tensor) -> Any:
        return self.down(self.inner(x)) * self.router(x).sigmoid()


def test_a_linear_with_one_output_is_never_edited() -> None:
    assert dict(structure_of(Weighed()).untouched) == {"router": "routes tokens"}


class Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Rounding(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight.round(), self.bias)


class Written(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class Named(nn.Linear):
    """Other arguments, the forward of `nn.Linear`."""

    def __init__(self, config: dict[str, int]) -> None:
        super().__init__(config["inputs"], config["outputs"])


class Strange(Named):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (linear(), True), (linear(bias=False), True), (Conv1D(4, 3), True), (Written(3, 4), True),
        (Named({"inputs": 3, "outputs": 4}), True), (Strange({"inputs": 3, "outputs": 4}), False),
        (Doubling(3, 4), False), (Rounding(3, 4), False), (nn.Bilinear(3, 3, 4), False), (nn.Embedding(3, 4), False),
    ],
)  # fmt: skip
def test_a_linear_is_what_computes_a_product_whatever_its_class(module: nn.Module, expected: bool) -> None:
    before = torch.get_rng_state()
    assert is_linear(module) is expected
    assert torch.equal(torch.get_rng_state(), before)


class OtherLinears(Gated):
    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.up = kind(HIDDEN, INNER)


@pytest.mark.parametrize("kind", [Doubling, Rounding])
def test_a_linear_that_computes_something_else_stays_and_so_does_its_network(kind: type[nn.Linear]) -> None:
    found = structure_of(OtherLinears(kind))
    assert dict(found.untouched) == {"up": f"{kind.__name__} is no plain linear"} and found.ffns == ()


def test_a_linear_that_computes_the_same_is_one() -> None:
    assert structure_of(OtherLinears(Written)).ffns == (Sublayer(("gate", "up"), "down"),)


@pytest.mark.parametrize(
    ("block", "name", "reason"),
    [(Twice, "up", "is called more than once"), (Bare, "down", "is not called as a module")],
)
def test_what_is_not_called_once_as_a_module_stays(block: type[nn.Module], name: str, reason: str) -> None:
    found = structure_of(block())
    assert dict(found.untouched)[name] == reason
    assert all(name not in group for position in found.positions for group in position)


def test_linears_that_may_not_be_edited_are_in_no_network() -> None:
    trace = trace_of(Gated())
    assert len(ffns_of(trace, {"gate", "up", "down"})) == 1
    for left in ("gate", "up", "down"):
        assert ffns_of(trace, {"gate", "up", "down"} - {left}) == []


def test_the_common_module_is_the_smallest_that_holds_all() -> None:
    block = Serial()
    block.extra = nn.ModuleDict({"list": nn.ModuleList([linear(), linear()])})
    assert common_module(block, ["attn.q", "attn.o"]) == "attn"
    assert common_module(block, ["attn.q", "mlp.down"]) == ""
    assert common_module(block, ["extra.list.0", "extra.list.1"]) == ""
    assert common_module(block, []) == ""
