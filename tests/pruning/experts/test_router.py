"""pruning/experts/router.py: refitted rows are a regression in float64 (oracle), and invariants of a softmax."""

from __future__ import annotations

import pytest
import torch

from compresskit.pruning.experts.evidence import Router
from compresskit.pruning.experts.refit import Routed
from compresskit.pruning.experts.router import is_softmax, refit_router

GROUPS, RIDGE = [[0, 4], [1, 2, 5], [3]], 0.05


def router(bias: bool, seed: int = 0) -> Router:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 5, generator=generator)
    return Router(weight, torch.randn(6, generator=generator) if bias else None)


def inputs(seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 5, generator=generator) for tokens in (20, 7)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [GROUPS, [[0, 4], [1, 2, 5, 3]]])
def test_rows_are_the_regression_on_what_the_groups_say_together(bias: bool, groups: list[list[int]]) -> None:
    old, batches = router(bias), inputs()
    x = torch.cat(batches).double()
    logits = x @ old.weight.double().T + (0 if old.bias is None else old.bias.double())
    if bias:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    gains = [logits[:, group].exp().sum(dim=1).log() - logits[:, group[0]] for group in groups]
    shift = min(float(gain.mean()) for gain in gains)
    eps = RIDGE * float(x.square().sum(dim=0).mean())
    rows = torch.cat([x, eps**0.5 * torch.eye(x.shape[1], dtype=torch.float64)])
    found = refit_router(old, batches, groups, RIDGE)
    for number, (group, gain) in enumerate(zip(groups, gains, strict=True)):
        change = torch.linalg.lstsq(rows, torch.cat([gain - shift, gain.new_zeros(x.shape[1])])[:, None]).solution[:, 0]
        assert torch.allclose(found.weight[number].double(), old.weight[group[0]].double() + change[:5], atol=1e-5)
        if found.bias is not None and old.bias is not None:
            assert float(found.bias[number]) == pytest.approx(float(old.bias[group[0]] + change[5]), abs=1e-5)


def test_groups_of_copies_keep_their_rows() -> None:
    old = router(False)
    old.weight[3:] = old.weight[:3]
    found = refit_router(old, inputs(), [[0, 3], [1, 4], [2, 5]], RIDGE)
    assert torch.allclose(found.weight, old.weight[:3], atol=1e-6)


@pytest.mark.parametrize(("kind", "expected"), [("softmax", True), ("all", True), ("sigmoid", False), ("one", True)])
def test_a_softmax_is_told_by_its_weights(kind: str, expected: bool) -> None:
    old, x = router(True), inputs()[0]
    logits = old.logits(x)
    top, chosen = logits.topk(1 if kind == "one" else 3)
    weights = {
        "softmax": top.softmax(dim=-1) * 2.5,
        "all": logits.softmax(dim=-1).gather(1, chosen),
        "sigmoid": top.sigmoid() / top.sigmoid().sum(dim=-1, keepdim=True),
        "one": top.sigmoid(),
    }[kind]
    assert is_softmax(old, x, Routed(x, chosen, weights.bfloat16().float(), x)) is expected
