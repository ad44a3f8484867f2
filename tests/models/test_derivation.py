"""models/derivation.py: which linears can be edited, in which order, and which channels can be removed.

Oracle: blocks written by hand, each beside what is known of it. Property: in any network that is accepted, removing a channel
gives what zeroing its column gives, also in networks of operations drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks_by_hand import ACCEPTED, HIDDEN, INNER, REJECTED, Bare, Gated, Twice, linear, structure_of, trace_of
from random_networks import OPERATIONS, Random, removing_is_zeroing
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from compresskit.models.architectures import Sublayer
from compresskit.models.derivation import common_module, ffns_of, is_linear


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_feed_forward_network_is_found(case: str) -> None:
    make, expected = ACCEPTED[case]
    assert structure_of(make()).ffns == (expected,)


@given(st.sampled_from(sorted(ACCEPTED)), st.integers(0, INNER - 1), st.integers(0, 99))
@torch.no_grad()
def test_removing_a_channel_of_an_accepted_network_is_zeroing_it(case: str, channel: int, seed: int) -> None:
    torch.manual_seed(seed)
    make, ffn = ACCEPTED[case]
    assert removing_is_zeroing(make(), ffn, channel)


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_no_plain_network_is_left_alone(case: str) -> None:
    assert structure_of(REJECTED[case]()).ffns == ()


@given(st.lists(st.sampled_from(sorted(OPERATIONS)), max_size=4), st.integers(0, INNER - 1))
@torch.no_grad()
def test_networks_of_random_operations_are_accepted_only_where_removing_is_zeroing(names: list[str], channel: int) -> None:
    torch.manual_seed(channel)
    block = Random(names)
    assert all(removing_is_zeroing(block, ffn, channel) for ffn in structure_of(block).ffns)


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
        self.down, self.up, self.side, self.o = (
            linear(outputs=4),
            linear(4, HIDDEN),
            linear(HIDDEN, HIDDEN),
            linear(HIDDEN, HIDDEN),
        )
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
