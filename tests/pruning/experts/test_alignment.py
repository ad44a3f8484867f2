"""pruning/experts/alignment.py: the order of neurons is no property of the function, and is found again. Invariants, oracle."""

from __future__ import annotations

import itertools

import pytest
import torch
from expert_problems import HIDDEN, WIDTH, experts, routed
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compresskit.pruning.experts.alignment import Layout, assigned, merged, neurons, put_neurons
from compresskit.pruning.experts.evidence import compare_activations
from compresskit.pruning.experts.m_smoe import MSMoE
from compresskit.pruning.experts.method import MergingMethod
from compresskit.pruning.experts.ream import REAM

FUSED = Layout(2)


def linears(made: nn.Module, expert: int) -> list[nn.Linear]:
    inside = made.get_submodule(str(expert))
    return [inside["gate_up_proj"], inside["down_proj"]]  # type: ignore[index]


@given(st.booleans(), st.booleans(), st.integers(0, 50))
def test_neurons_are_put_back_as_they_were(interleaved: bool, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    ours = [nn.Linear(HIDDEN, 2 * WIDTH, bias), nn.Linear(WIDTH, HIDDEN, bias)]
    theirs = [nn.Linear(HIDDEN, 2 * WIDTH, bias), nn.Linear(WIDTH, HIDDEN, bias)]
    layout = Layout(2, interleaved)
    rows = neurons(ours, layout)
    gate = ours[0].weight[0::2] if interleaved else ours[0].weight[:WIDTH]
    assert rows.shape == (WIDTH, 3 * HIDDEN + 2 * bias) and torch.equal(rows[:, :HIDDEN], gate)
    put_neurons(theirs, layout, rows)
    assert torch.equal(theirs[0].weight, ours[0].weight) and torch.equal(theirs[1].weight, ours[1].weight)
    assert not bias or torch.equal(theirs[0].bias, ours[0].bias)


@torch.no_grad()
@pytest.mark.parametrize("method", [MSMoE(), REAM()])
def test_a_permuted_copy_merges_without_loss(method: MergingMethod) -> None:
    made, (x, chosen, weights) = experts(1), routed(1, 30)
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2))
    core, copy = linears(made, 0), linears(made, 3)
    put_neurons(copy, FUSED, neurons(core, FUSED)[order])
    copy[1].bias = core[1].bias
    expected = made(x, chosen, weights)
    assert torch.allclose(expected, made(x, torch.where(chosen == 3, 0, chosen), weights), atol=1e-6)  # the same function
    rows = [neurons(linears(made, expert), FUSED) for expert in (0, 3)]
    likeness = method.likeness(*rows, compare_activations(made, 0, 3, [x]))
    assert assigned(likeness).tolist() == order.argsort().tolist()
    put_neurons(core, FUSED, merged([rows[0], rows[1][assigned(likeness)]], [0.3, 2.0]))
    assert torch.allclose(made(x, torch.where(chosen == 3, 0, chosen), weights), expected, atol=1e-6)


def test_the_assignment_is_the_best_of_all() -> None:
    likeness = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    best = max(itertools.permutations(range(5)), key=lambda order: sum(float(likeness[i, j]) for i, j in enumerate(order)))
    assert assigned(likeness).tolist() == list(best)


def test_a_mean_is_weighted_and_falls_back_to_the_one_that_stays() -> None:
    each = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])]
    assert merged(each, [3.0, 1.0]).tolist() == [2.0, 1.0]
    assert merged(each, [0.0, 0.0]).tolist() == [1.0, 2.0]
