"""pruning/depth/fold.py: against a least-squares solver in float64 (oracle); a refit never makes it worse (property)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from compresskit.pruning.depth.fold import fold, scale_of
from compresskit.walk.block import Block
from compresskit.walk.calls import Call

HIDDEN, WIDTH, TOKENS = 5, 7, 40


class Residual(nn.Module):
    """x + scale * norm(linear(tanh(M x))), the norm left out unless asked for."""

    def __init__(self, seed: int, scale: float, normed: bool = False):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mixing = torch.randn(WIDTH, HIDDEN, generator=generator)
        self.down = nn.Linear(WIDTH, HIDDEN)
        self.down.weight = nn.Parameter(torch.randn(HIDDEN, WIDTH, generator=generator), requires_grad=False)
        self.norm = nn.LayerNorm(HIDDEN) if normed else nn.Identity()
        self.scale = scale

    def inputs(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.mixing.T)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(self.down(self.inputs(x)))


def problem(seed: int, scale: float = 1.0, normed: bool = False) -> tuple[Block, list[Tensor]]:
    """A block with two micro-batches, and what it should give."""
    generator = torch.Generator().manual_seed(seed + 1)
    hidden, targets = ([torch.randn(2, TOKENS, HIDDEN, generator=generator) for _ in range(2)] for _ in range(2))
    return Block(0, "block", Residual(seed, scale, normed), hidden, [Call((), {})] * 2, "", micro_batches=2), targets


@pytest.mark.parametrize("scale", [1.0, -0.22, 3.0])
@torch.no_grad()
def test_the_refit_is_the_ridge_regression_of_what_is_missing(scale: float) -> None:
    block, targets = problem(0, scale)
    module: Residual = block.module  # type: ignore[assignment]
    found = fold(block, module.down, scale, targets, ridge=0.01)
    x, y = (torch.cat(each).flatten(0, 1).double() for each in (block.hidden, targets))
    inputs = module.inputs(x.float()).double()
    others = x + scale * module.down.bias.double()  # what the block gives without the weight
    eps = 0.01 * float(inputs.square().sum(dim=0).mean())
    rows = torch.cat([inputs, eps**0.5 * torch.eye(WIDTH, dtype=torch.float64)])
    wanted = torch.cat([(y - others) / scale, eps**0.5 * module.down.weight.double().T])
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(found.weight.double(), expected, atol=1e-4)
    energy = float(((y - others) / scale).square().sum())
    for weight, error in ((module.down.weight, found.error_before), (found.weight, found.error_after)):
        left = float((y - others - scale * inputs @ weight.double().T).square().sum()) / scale**2
        assert error == pytest.approx(left / energy, rel=1e-3)


@given(st.integers(0, 200), st.sampled_from([0.001, 0.05, 1.0]))
@torch.no_grad()
def test_a_refit_never_leaves_more_error(seed: int, ridge: float) -> None:
    block, targets = problem(seed)
    found = fold(block, block.module.down, 1.0, targets, ridge)  # type: ignore[arg-type]
    assert found.error_after <= found.error_before * (1 + 1e-5)


@pytest.mark.parametrize("scale", [1.0, -0.22, 3.0])
@torch.no_grad()
def test_the_number_that_multiplies_a_linears_output_is_found_and_its_weight_put_back(scale: float) -> None:
    block, _ = problem(3, scale)
    module: Residual = block.module  # type: ignore[assignment]
    before = module.down.weight.clone()
    assert scale_of(block, module.down) == pytest.approx(scale, rel=1e-4)
    assert torch.equal(module.down.weight, before)


@torch.no_grad()
def test_a_linear_before_a_norm_has_no_such_number() -> None:
    block, _ = problem(3, normed=True)
    assert scale_of(block, block.module.down) is None  # type: ignore[arg-type]
