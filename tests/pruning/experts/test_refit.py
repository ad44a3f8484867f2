"""pruning/experts/refit.py: a sweep is closed-form least squares in float64, by an augmented regression. Oracle, properties."""

from __future__ import annotations

import pytest
import torch
from expert_problems import COUNT, experts, routed
from hypothesis import given, settings
from hypothesis import strategies as st

from compresskit.models.experts import PlainExperts
from compresskit.pruning.experts import refit as refit_file
from compresskit.pruning.experts.refit import Refitted, Routed, refit_experts

RIDGE = 0.05


def problem(seed: int, tokens: int = 40, used: int = COUNT) -> tuple[PlainExperts, list[Routed], list[torch.Tensor]]:
    made, other = experts(seed), experts(seed + 1000)
    batches, targets = [], []
    with torch.no_grad():
        for part in range(2):
            x, chosen, weights = routed(10 * seed + part, tokens, used)
            batches.append(Routed(x, chosen, weights, made(x, chosen, weights)))
            targets.append(other(x, chosen.flip(0), weights))
    return made, batches, targets


def error(made: PlainExperts, batches: list[Routed], targets: list[torch.Tensor]) -> float:
    left = sum(
        float((y - made(b.hidden, b.chosen, b.weights)).double().square().sum()) for b, y in zip(batches, targets, strict=True)
    )
    return left / sum(float(y.double().square().sum()) for y in targets)


@torch.no_grad()
def test_each_step_is_the_regression_on_what_the_others_leave() -> None:
    made, batches, targets = problem(1, used=4)
    x, chosen, weights = (torch.cat(each) for each in zip(*[batch[:3] for batch in batches], strict=True))
    y = torch.cat(targets).double()
    old = [made.down(e).weight.double() for e in range(COUNT)]
    now = [each.clone() for each in old]

    def weighted(e: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate = (weights * (chosen == e)).sum(dim=1, keepdim=True).double()
        return gate * made.inner(e, x).double(), gate * made.down(e).bias.double()

    for _ in range(refit_file.SWEEPS):
        for e in range(COUNT):
            inputs, bias = weighted(e)
            others = sum(weighted(o)[0] @ now[o].T + weighted(o)[1] for o in range(COUNT) if o != e)
            eps = RIDGE * float(inputs.square().sum(dim=0).mean())
            rows = torch.cat([inputs, eps**0.5 * torch.eye(inputs.shape[1], dtype=torch.float64)])
            if eps:
                now[e] = torch.linalg.lstsq(rows, torch.cat([y - others - bias, eps**0.5 * old[e].T])).solution.T
    before = error(made, batches, targets)
    found = refit_experts(made, batches, targets, RIDGE, torch.float32)
    for e in range(COUNT):
        assert torch.allclose(made.down(e).weight.double(), now[e], atol=1e-4), e
    assert torch.equal(made.down(4).weight.double(), old[4])  # no token chose it
    assert found.before == pytest.approx(before, rel=1e-4)
    assert found.after == pytest.approx(error(made, batches, targets), rel=1e-4) and found.changed


@settings(max_examples=20)
@given(st.integers(0, 200), st.sampled_from([1e-3, 0.05, 10.0]), st.sampled_from([torch.float32, torch.bfloat16]))
@torch.no_grad()
def test_the_error_never_rises(seed: int, ridge: float, stored: torch.dtype) -> None:
    made, batches, targets = problem(seed, tokens=8)
    before = error(made, batches, targets)
    found = refit_experts(made, batches, targets, ridge, stored)
    assert found.after <= found.before
    assert error(made, batches, targets) <= before * (1 + 1e-5)


@torch.no_grad()
def test_what_makes_it_worse_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    made, batches, targets = problem(2)
    old = [made.down(e).weight.clone() for e in range(COUNT)]
    monkeypatch.setattr(refit_file, "solved", lambda gram, right, eps: right.float() * 1e3)
    found = refit_experts(made, batches, targets, RIDGE, torch.float32)
    assert not found.changed and found.after == found.before
    assert all(torch.equal(made.down(e).weight, old[e]) for e in range(COUNT))


@torch.no_grad()
def test_outputs_that_are_right_change_nothing() -> None:
    made, batches, _ = problem(3)
    old = [made.down(e).weight.clone() for e in range(COUNT)]
    assert refit_experts(made, batches, [each.output for each in batches], RIDGE, torch.float32) == Refitted(0.0, 0.0, False)
    assert all(torch.equal(made.down(e).weight, old[e]) for e in range(COUNT))
