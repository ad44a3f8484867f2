"""The experts of a block as plain linears, in place of transformers' 3-D tensors."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from compresskit.models.architectures import DOWN, GATE, GATE_AND_UP, UP

PACKED = (GATE_AND_UP, UP, DOWN)
"""Names of the 3-D tensors in the classes that transformers' `use_experts_implementation` makes."""


class PlainExperts(nn.Module):
    """The experts of one block as plain linears, with the interface of transformers' 3-D experts."""

    def __init__(self, stock: nn.Module, count: int, projections: dict[str, nn.Linear]):
        """`stock`: the module that is replaced; it still computes the gate. `projections`: a template linear per name."""
        super().__init__()
        for expert in range(count):
            self.add_module(str(expert), nn.ModuleDict({name: _alike(each) for name, each in projections.items()}))
        self.count = count
        self.total = int(getattr(stock, "num_experts", count))
        self.fused = GATE_AND_UP in projections
        self.order = [name for name in inspect.signature(type(stock).forward).parameters if name != "self"][:3]
        self._stock = [stock]  # in a list, so that its 3-D parameters are not this module's
        self.act_fn: Any = getattr(stock, "act_fn", None)
        self.traced = False

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k) -> (tokens, hidden)."""
        hidden, chosen, weights = self.arguments(args, kwargs)
        if self.traced:  # which tokens go where depends on values, which a trace has not
            traced: Tensor = self._expert(0, hidden.clone()) * weights.flatten(0, -2)[:, :1]
            return traced
        result = torch.zeros_like(hidden)
        for expert in range(self.count):
            token, position = torch.where(chosen == expert)
            if token.numel() == 0:
                continue
            y = self._expert(expert, hidden[token]) * weights[token, position, None]
            result.index_add_(0, token, y.to(result.dtype))
        return result

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(hidden states, chosen experts, their weights) among the arguments of a call, in whichever order the family has."""
        hidden, chosen, weights = (*args, *(kwargs[name] for name in self.order[len(args) :]))[:3]
        return hidden, chosen, weights

    def inner(self, expert: int, x: Tensor) -> Tensor:
        """The inputs (tokens, width) of the output projection of one expert for x (tokens, hidden)."""
        found: Tensor = self._activated(self.get_submodule(str(expert)), x)
        return found

    def down(self, expert: int) -> nn.Linear:
        """The output projection of one expert."""
        linears: Any = self.get_submodule(str(expert))
        found: nn.Linear = linears[DOWN]
        return found

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        found: Tensor = self.down(expert)(self.inner(expert, x))
        return found

    def _activated(self, linears: Any, x: Tensor) -> Any:
        """The inputs of the down projection of one expert."""
        stock: Any = self._stock[0]
        if not stock.has_gate:
            return self.act_fn(linears[UP](x))
        if self.fused:
            return stock._apply_gate(linears[GATE_AND_UP](x))
        gate, up = linears[GATE](x), linears[UP](x)
        if type(stock)._apply_gate is moe._default_apply_gate:
            return self.act_fn(gate) * up
        both = torch.cat([gate, up], dim=-1) if stock.is_concatenated else torch.stack([gate, up], dim=-1).flatten(-2)
        return stock._apply_gate(both)


def _alike(linear: nn.Linear) -> nn.Linear:
    """A linear of the same shape: fake tensors, which a trace has, cannot be copied."""
    return nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device=linear.weight.device)


def can_be_unpacked(module: nn.Module) -> bool:
    """Whether a module's experts have the form that transformers' own fast implementations rely on."""
    stated = all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "has_bias", "num_experts"))
    parameters = dict(module.named_parameters(recurse=False))
    needed = (GATE_AND_UP if getattr(module, "has_gate", True) else UP, DOWN)
    biases = {f"{name}_bias" for name in needed} if getattr(module, "has_bias", False) else set()
    exact = set(parameters) == {*needed, *biases} and all(parameters[name].ndim == 3 for name in needed)
    gate: Any = getattr(type(module), "_apply_gate", None)
    own_gate = getattr(module, "has_gate", False) and gate is not moe._default_apply_gate
    simple = not getattr(module, "has_post_expert_norm", False) and (own_gate or hasattr(module, "act_fn"))
    return stated and exact and simple and not list(module.buffers(recurse=False))


def opaque(module: nn.Module) -> bool:
    """Whether a module holds experts in a form that is not unpacked: a trace cannot run it, a walk runs it as it is."""
    return type(module).__name__.endswith("Experts") and not isinstance(module, PlainExperts)


def unpacked(module: nn.Module, fused: bool, device: torch.device, count: int | None = None) -> PlainExperts:
    """Build the plain form of experts for which `can_be_unpacked` holds.

    `fused`: whether gate and up stay one matrix. `count`: number of experts, by default all.

    Returns:
        The experts, whose parameters are empty tensors on `device`.
    """
    stock: Any = module
    first = getattr(stock, GATE_AND_UP if stock.has_gate else UP).shape[1:]
    rows, hidden = first[::-1] if stock.is_transposed else first
    width = rows // 2 if stock.has_gate else rows

    def linear(inputs: int, outputs: int) -> nn.Linear:
        return nn.Linear(inputs, outputs, bias=stock.has_bias, device=device)

    projections = {GATE_AND_UP: linear(hidden, rows)} if stock.has_gate and fused else {UP: linear(hidden, width)}
    if stock.has_gate and not fused:
        projections = {GATE: linear(hidden, width), **projections}
    projections[DOWN] = linear(width, hidden)
    return PlainExperts(module, int(stock.num_experts) if count is None else count, projections)
