"""models/experts.py: experts as plain linears compute exactly what transformers' eager experts compute. Oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import TINY, config_of
from small_runs import slow_but
from torch import Tensor, nn

from compresskit.models.experts import PlainExperts, can_be_unpacked, opaque, unpacked
from compresskit.models.network import build_network

CPU = torch.device("cpu")
TOKENS, CHOSEN = 11, 2
QUICK = ("mixtral", "gpt_oss", "nemotron_h", "granitemoe")
EXPERTS = (
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe", "gemma4_text", "glm4_moe", "glm4_moe_lite", "gpt_oss",
    "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba", "kimi_linear", "lfm2_moe",
    "minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text",
    "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
)  # fmt: skip
"""Types whose experts are of transformers' common form."""
OTHERS = ("dbrx", "llama4", "llama4_text")
"""Types with experts of a form of their own."""


def stock_experts(model_type: str) -> nn.Module:
    """The type's experts with random weights, in double precision, so that any other order of sums would show."""
    network = build_network(config_of(model_type))
    found: Any = next(module for module in network.modules() if can_be_unpacked(module))
    found.config._experts_implementation = "eager"
    made: nn.Module = type(found)(found.config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return made


def filled(stock: Any, fused: bool) -> PlainExperts:
    """The plain form with the stock weights, written out by hand for each kind of layout."""
    plain = unpacked(stock, fused, CPU).double()
    for expert in range(stock.num_experts):
        for name, linear in plain.get_submodule(str(expert)).named_children():
            source = "gate_up_proj" if stock.has_gate and name in ("gate_proj", "up_proj") else name
            weight = getattr(stock, source)[expert].detach()
            weight = weight.T if stock.is_transposed else weight
            put(linear, "weight", half(weight, name, stock) if source != name else weight)
            if stock.has_bias:
                bias = getattr(stock, f"{source}_bias")[expert].detach()
                put(linear, "bias", half(bias, name, stock) if source != name else bias)
    return plain


def half(rows: Tensor, name: str, stock: Any) -> Tensor:
    first = name == "gate_proj"
    width = len(rows) // 2
    if stock.is_concatenated:
        return rows[:width] if first else rows[width:]
    return rows[0::2] if first else rows[1::2]


def put(linear: nn.Module, leaf: str, value: Tensor) -> None:
    assert getattr(linear, leaf).shape == value.shape
    linear.register_parameter(leaf, nn.Parameter(value.contiguous()))


def routed(stock: Any, hidden: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the experts, of which the last gets no token."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, hidden, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(stock.num_experts - 1, generator=generator)[:CHOSEN] for _ in range(TOKENS)])
    return x, chosen, torch.rand(TOKENS, CHOSEN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("model_type", slow_but(*QUICK, of=EXPERTS))
def test_plain_experts_compute_what_the_stock_ones_do(model_type: str, fused: bool) -> None:
    stock: Any = stock_experts(model_type)
    if not (fused or stock.has_gate):
        pytest.skip("there is no gate to separate")
    plain = filled(stock, fused)
    down: Any = plain.get_submodule("0.down_proj")
    inputs = routed(stock, int(down.weight.shape[0]))
    with torch.no_grad():
        expected, found = stock(*inputs), plain(*inputs)
        by_name = plain(inputs[0], **dict(zip(plain.order[1:], inputs[1:], strict=True)))
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12) and torch.equal(by_name, found)
    assert (plain.count, plain.total, plain.fused) == (4, 4, fused and stock.has_gate)


class Half(nn.Module):
    """A gate of its own, of the form that transformers' decorator leaves in place."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias, self.is_transposed, self.is_concatenated = 4, True, False, False, True
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(4, 12, 8)), nn.Parameter(torch.randn(4, 8, 6))

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate.clamp(max=0.5).tanh() * (up - 1)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_states)
        for token, (experts, weights) in enumerate(zip(top_k_index, top_k_weights, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                inner = self._apply_gate(self.gate_up_proj[expert] @ hidden_states[token])
                out[token] += weight * (self.down_proj[expert] @ inner)
        return out


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("concatenated", [True, False])
def test_a_gate_of_its_own_is_kept(fused: bool, concatenated: bool) -> None:
    stock = Half().double()
    stock.is_concatenated = concatenated
    if not concatenated:
        stock._apply_gate = lambda gate_up: gate_up[..., ::2].sin() * gate_up[..., 1::2]  # type: ignore[method-assign]
    with torch.no_grad():
        inputs = routed(stock, 8)
        assert torch.allclose(filled(stock, fused)(*inputs), stock(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_the_lists_here_name_every_type_with_experts() -> None:
    for model_type in TINY:
        network = build_network(config_of(model_type))
        plain = any(can_be_unpacked(module) for module in network.modules())
        other = any(opaque(module) and not can_be_unpacked(module) for module in network.modules())
        assert (plain, other) == (model_type in EXPERTS, model_type in OTHERS), model_type


@pytest.mark.parametrize("model_type", OTHERS)
def test_experts_of_another_form_are_not_unpacked(model_type: str) -> None:
    experts = [each for each in build_network(config_of(model_type)).modules() if type(each).__name__.endswith("Experts")]
    assert experts and not any(can_be_unpacked(each) for each in experts) and all(opaque(each) for each in experts)


def without(change: str) -> nn.Module:
    stock: Any = Half()
    if change == "a further parameter":
        stock.scale = nn.Parameter(torch.ones(4))
    elif change == "a bias that is not stated":
        stock.down_proj_bias = nn.Parameter(torch.ones(4, 8))
    elif change == "a stated bias that is missing":
        stock.has_bias = True
    elif change == "a buffer":
        stock.register_buffer("limit", torch.ones(4))
    elif change == "a norm after each expert":
        stock.has_post_expert_norm = True
    elif change == "matrices of two dimensions":
        stock.down_proj = nn.Parameter(torch.randn(32, 6))
    elif change == "an unstated order of the rows":
        del stock.is_concatenated
    elif change == "no activation":
        stock.has_gate = False
        stock.up_proj = stock.gate_up_proj
        del stock.gate_up_proj
    return stock  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "change",
    [
        "a further parameter", "a bias that is not stated", "a stated bias that is missing", "a buffer",
        "a norm after each expert", "matrices of two dimensions", "an unstated order of the rows", "no activation",
    ],
)  # fmt: skip
def test_experts_that_do_anything_more_are_not_unpacked(change: str) -> None:
    assert can_be_unpacked(without("")) and not can_be_unpacked(without(change))


def test_a_plain_linear_is_no_experts() -> None:
    assert not can_be_unpacked(nn.Linear(3, 4)) and not opaque(nn.Linear(3, 4))
