"""models/tracing.py: which blocks a network has, and what one run of them without values shows. Oracle: networks by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import config_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from traced_networks import FILE, HIDDEN, INNER, Block, Network, traces
from transformers import AutoConfig

from compresskit.errors import UnsupportedArchitecture
from compresskit.models.architectures import Sublayer
from compresskit.models.derivation import ffns_of
from compresskit.models.experts import PlainExperts
from compresskit.models.network import build_network
from compresskit.models.tracing import blocks_path, kinds_of, make_fake, unpack_experts

USABLE = {"up", "down"}
FFN = Sublayer(("up",), "down")


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", "model.layers"), ("gpt2", "transformer.h"), ("opt", "model.decoder.layers"), ("mpt", "transformer.blocks"),
        ("gemma3", "model.language_model.layers"), ("mistral3", "model.language_model.layers"),
        ("qwen2_vl", "model.language_model.layers"), ("mamba", "backbone.layers"), ("longcat_flash", "model.layers"),
    ],
)  # fmt: skip
def test_the_blocks_are_those_of_the_text_decoder(model_type: str, expected: str) -> None:
    assert blocks_path(build_network(config_of(model_type)), FILE) == expected


def test_a_decoder_that_is_the_head_does_not_hide_the_blocks() -> None:
    config = AutoConfig.for_model("modernbert-decoder", num_hidden_layers=3)
    assert blocks_path(build_network(config), FILE) == "model.layers"


def test_a_network_without_a_list_of_blocks_is_refused() -> None:
    network: Any = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(UnsupportedArchitecture, match=r"config\.json: Sequential has no list of decoder blocks"):
        blocks_path(network, FILE)


def test_blocks_are_of_one_kind_whatever_their_number_and_of_others_by_shape_and_setting() -> None:
    other = Block(3)
    other.down.bias = None  # type: ignore[assignment]
    flagged = Block(5)
    flagged.up.window = 4  # type: ignore[assignment]
    kinds = kinds_of([Block(0), Block(1), Block(2, 2 * INNER), other, Block(4), flagged, Block(6, 2 * INNER)])
    assert kinds == ([0, 0, 1, 2, 0, 3, 1], [0, 2, 3, 5])


def test_one_block_of_each_kind_runs() -> None:
    ran: list[int] = []

    class Noting(Block):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            ran.append(self.layer_idx)
            return super().forward(hidden_states)

    first, second = traces(Noting(0), Noting(1), Noting(2, 2 * INNER), Noting(3))
    assert ran == [0, 2, *range(4)]  # then all, as a walk runs them
    assert (first.ran, first.hidden, first.tuple_length) == (True, HIDDEN, 0)
    assert [call.name for call in second.calls] == ["up", "down"] and second.calls[1].inputs == 2 * INNER
    assert second.calls[0].facts.reach == frozenset()  # what the first block computed is no part of the second


def test_where_a_block_reads_what_an_earlier_one_left_all_blocks_run() -> None:
    class Leaving(Block):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            shared[self.layer_idx] = hidden_states.mean()
            return super().forward(hidden_states) * shared.get(self.layer_idx - 1, 1)

    class Reading(Leaving):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            return Block.forward(self, hidden_states) * shared[self.layer_idx - 1]

    assert [trace.ran for trace in traces(Leaving(0), Leaving(1), Reading(2))] == [True, True]


def test_where_only_the_network_hands_on_what_a_block_left_it_is_refused() -> None:
    """A walk calls each block with what it would have got before any block ran."""

    class Leaving(Block):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            return super().forward(hidden_states), hidden_states.mean() + (0 if self.layer_idx == 0 else shared)

    class HandingOn(Network):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            hidden, shared = self.embed(input_ids), None
            for block in self.blocks:
                hidden, shared = block(hidden, shared=shared)
            return hidden

    with pytest.raises(UnsupportedArchitecture, match=r"HandingOn cannot be traced \(Leaving takes more from"):
        traces(Leaving(0), Leaving(1), network=HandingOn)


class HandsOn(Network):
    """Gives each block what it makes of the one before."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        shared: Any = hidden.mean()
        for block in self.blocks:
            hidden = block(hidden, shared=shared)
            shared = self.made_of(hidden)
        return hidden

    def made_of(self, hidden: Tensor) -> Any:
        return 2 * hidden.detach().mean()


class HandsOnPairs(HandsOn):
    def made_of(self, hidden: Tensor) -> Any:
        return torch.ones(3), hidden.clone()


class HandsOnConstants(HandsOn):
    def made_of(self, hidden: Tensor) -> Any:
        return torch.ones(hidden.shape)


@pytest.mark.parametrize("network", [HandsOn, HandsOnPairs])
def test_a_network_that_gives_blocks_more_of_earlier_ones_than_the_stream_is_refused(network: type[nn.Module]) -> None:
    """A walk would give them what follows from the first hidden states."""
    with pytest.raises(UnsupportedArchitecture, match="Block takes more from the block before it than hidden states"):
        traces(Block(0), Block(1), network=network)


def test_a_network_may_give_blocks_what_follows_from_none() -> None:
    assert [trace.ran for trace in traces(Block(0), Block(1, 2 * INNER), network=HandsOnConstants)] == [True, True]


def added(hidden: Tensor) -> Tensor:
    return hidden + 1


def added_in_place(hidden: Tensor) -> Tensor:
    hidden[:, :2] += 1
    return hidden


def seen_otherwise(hidden: Tensor) -> Tensor:
    return hidden[:, :].view(hidden.shape)


class Between(Network):
    """Changes the stream on the way from a block to the next."""

    change: Callable[[Tensor], Tensor]

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = type(self).change(block(hidden))
        return hidden


@pytest.mark.parametrize("change", [added, added_in_place])
@pytest.mark.parametrize("sizes", [(INNER, INNER), (INNER, 2 * INNER)])
def test_a_network_that_changes_the_stream_between_blocks_is_refused(
    change: Callable[[Tensor], Tensor], sizes: tuple[int, int]
) -> None:
    kind = type("Changing", (Between,), {"change": staticmethod(change)})
    with pytest.raises(UnsupportedArchitecture, match=r"Changing cannot be traced \(Block does not run on what the block before"):
        traces(Block(0, sizes[0]), Block(1, sizes[1]), network=kind)


def test_a_network_may_look_at_the_stream_between_blocks() -> None:
    kind = type("Looking", (Between,), {"change": staticmethod(seen_otherwise)})
    assert [trace.ran for trace in traces(Block(0), Block(1), Block(2, 2 * INNER), network=kind)] == [True, True]


def test_a_network_that_runs_its_blocks_more_than_once_is_refused() -> None:
    class Looping(Network):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            hidden = self.embed(input_ids)
            for block in [*self.blocks, *self.blocks]:
                hidden = block(hidden)
            return hidden

    with pytest.raises(UnsupportedArchitecture, match=r"Looping cannot be traced \(Block runs more than once"):
        traces(Block(0), Block(1), network=Looping)


def test_a_network_whose_blocks_run_on_more_than_the_text_is_refused() -> None:
    class Prompted(Network):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return super().forward(torch.cat([torch.zeros(1, 3, dtype=torch.int64), input_ids], dim=1), use_cache)

    with pytest.raises(
        UnsupportedArchitecture, match=r"Prompted cannot be traced \(Block runs on .* of shape \[1, 10, 8\] for 7 tokens"
    ):
        traces(Block(), network=Prompted)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_blocks_may_return_tuples(length: int) -> None:
    class Tuple(Block):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            return (super().forward(hidden_states), *[None] * (length - 1))

    [trace] = traces(Tuple(0), Tuple(1))
    assert trace.tuple_length == length and ffns_of(trace, USABLE) == [FFN]


class InTuple(Block):
    def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
        inner = functional.gelu(self.up(hidden_states))
        return hidden_states + self.down(inner), inner


class InDictionary(Block):
    def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
        shared["inner"] = functional.gelu(self.up(hidden_states))
        return hidden_states + self.down(shared["inner"])


class InList(Block):
    def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
        shared["list"] = [self.up(hidden_states)[..., : self.size]]
        return hidden_states + self.down(functional.gelu(shared["list"][0]))


@pytest.mark.parametrize("kind", [InTuple, InDictionary, InList])
def test_channels_that_a_block_hands_to_later_ones_stay(kind: type[nn.Module]) -> None:
    [trace] = traces(kind())
    assert ffns_of(trace, USABLE) == []


def test_a_residual_stream_that_blocks_change_in_place_begins_anew_in_each() -> None:
    class InPlace(Block):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            hidden_states[:, :3] += self.down(functional.gelu(self.up(hidden_states)))[:, :3]
            return hidden_states

    found = traces(InPlace(0), InPlace(1, 2 * INNER))
    assert [ffns_of(trace, USABLE) for trace in found] == [[FFN], [FFN]]
    assert found[1].calls[0].facts.reach == frozenset()


def test_a_block_that_changes_the_width_of_the_stream_is_refused() -> None:
    class Widening(Block):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            return torch.cat([hidden_states, hidden_states], dim=-1)

    with pytest.raises(UnsupportedArchitecture, match=r"Network cannot be traced \(Widening does not return hidden states of"):
        traces(Widening())


def test_a_network_that_needs_values_is_refused_in_one_line() -> None:
    class Choosing(Block):
        def forward(self, hidden_states: Tensor, shared: Any = None) -> Any:
            return super().forward(hidden_states) if hidden_states.sum().item() > 0 else hidden_states

    with pytest.raises(UnsupportedArchitecture, match=r"config\.json: Network cannot be traced") as caught:
        traces(Choosing())
    assert "\n" not in str(caught.value)


def test_a_network_whose_blocks_do_not_run_on_text_is_refused() -> None:
    class Idle(Network):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return self.embed(input_ids)

    with pytest.raises(UnsupportedArchitecture, match="no block runs on text alone"):
        traces(Block(), network=Idle)


def test_a_block_that_text_passes_by_is_seen_not_to_run() -> None:
    class Skipping(Network):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return self.blocks[0](self.embed(input_ids))

    found = traces(Block(0), Block(1, 2 * INNER), network=Skipping)
    assert [(trace.ran, len(trace.calls)) for trace in found] == [(True, 2), (False, 0)]


def test_a_fake_network_has_the_shapes_and_no_memory() -> None:
    network = build_network(config_of("gemma3"))
    shapes = {name: tensor.shape for name, tensor in [*network.named_parameters(), *network.named_buffers()]}
    with FakeTensorMode(allow_non_fake_inputs=True):
        make_fake(network)
    found = dict([*network.named_parameters(), *network.named_buffers()])
    assert {name: tensor.shape for name, tensor in found.items()} == shapes
    assert all(isinstance(tensor, FakeTensor) for tensor in network.buffers())
    assert all(isinstance(tensor.data, FakeTensor) and str(tensor.device) == "cpu" for tensor in network.parameters())


def test_one_expert_stands_for_all_and_others_are_left_out() -> None:
    network = build_network(config_of("mixtral"))
    path = "model.layers.{}.mlp.experts"
    unpack_experts(network, "model.layers", {path.format(1)})
    for index, fused in enumerate((True, False, True)):
        plain: Any = network.get_submodule(path.format(index))
        assert isinstance(plain, PlainExperts) and (plain.count, plain.total, plain.fused) == (1, 4, fused)
        assert {name for name, _ in plain.get_submodule("0").named_children()} == (
            {"gate_up_proj", "down_proj"} if fused else {"gate_proj", "up_proj", "down_proj"}
        )
    llama4 = build_network(config_of("llama4_text"))
    unpack_experts(llama4, "model.layers", set())
    experts: Any = llama4.get_submodule("model.layers.1.feed_forward.experts")
    x = torch.ones(5, 3)
    assert not isinstance(experts, PlainExperts) and torch.equal(experts(x), torch.zeros(5, 3))
