"""Refit the output projections of the experts that stay to what the original's experts gave, one after the other.

    r_t = y_t - sum_e g_e(t) f_e(x_t)                                     what is missing                  (1)
    A_e = sum_t g_e(t)^2 a a^T ,   B_e = sum_t g_e(t) r_t a^T             a = a_e(x_t)                     (2)
    W_e <- W_e + (B_e + eps (W_e0 - W_e)) (A_e + eps I)^-1 ,   eps = ridge * mean(diag A_e)                (3)

symbol   meaning                                                         shape             name here
y_t      output of the original's experts on the original's inputs       (tokens, hidden)  targets
x_t      inputs of the experts in the pruned model                       (tokens, hidden)  hidden
g_e(t)   weight of expert e in the pruned model, 0 if it is not chosen                     weights
W_e      output projection of expert e, W_e0 before the refit            (hidden, width)   down
a_e(x)   inputs of W_e                                                   (tokens, width)   inner

(3) is the minimum over W_e of sum_t ||r_t||^2 + eps ||W_e - W_e0||^2 with the other experts held: block Gauss-Seidel. Each step
lowers that objective, which at first is the error itself, so the error on the calibration text never rises but by rounding
to the stored dtype; if it does, the old weights stay. An expert without tokens keeps its weights. No paper; the pruning papers
refit nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.errors import NumericalError
from compresskit.models.experts import PlainExperts
from compresskit.numerics.factorised import in_one_thread
from compresskit.walk.sequence import replace_weight

SWEEPS = 2


class Routed(NamedTuple):
    """What ran through a block's experts in one micro-batch."""

    hidden: Tensor
    """(tokens, hidden)."""
    chosen: Tensor
    """Numbers of the experts, (tokens, k) int64."""
    weights: Tensor
    """(tokens, k)."""
    output: Tensor
    """(tokens, hidden)."""


class Refitted(NamedTuple):
    """Errors of a block's experts on the calibration text, as shares of the original output's energy."""

    before: float
    after: float
    changed: bool
    """Whether the new weights are there."""


def missing(routed: Sequence[Routed], targets: Sequence[Tensor]) -> list[Tensor]:
    """Equation 1 by micro-batch, (tokens, hidden) float32."""
    return [target.float() - each.output.float() for each, target in zip(routed, targets, strict=True)]


def energy(batches: Sequence[Tensor]) -> float:
    """Sum of squares over all tokens of all ranks; each micro-batch is summed in float32."""
    found = torch.zeros(1, dtype=torch.float64)
    for each in batches:
        found += each.square().sum().double().cpu()
    return float(distributed.total(found))


def share(error: float, whole: float) -> float:
    """An error as a share of an energy; 0 of none."""
    return error / whole if whole > 0 else 0.0


def refit_experts(
    experts: PlainExperts, routed: Sequence[Routed], targets: Sequence[Tensor], ridge: float, stored: torch.dtype
) -> Refitted:
    """Put refitted output projections, rounded to `stored`, into the experts; `routed` and `targets` are of this rank.

    Returns:
        The errors before and after, of all ranks.

    Raises:
        NumericalError: a system of equation 3 is not positive definite.
    """
    left = missing(routed, targets)
    whole, before = energy([target.float() for target in targets]), energy(left)
    old = [experts.down(expert).weight.detach().float().clone() for expert in range(experts.count)]
    if before > 0:
        for _ in range(SWEEPS):
            for expert in range(experts.count):
                new = _improved(experts, expert, old[expert], routed, left, ridge)
                if new is not None:
                    _replace(experts, expert, new.to(stored), routed, left)
    after = energy(left)
    changed = after < before
    if not changed:
        for expert, weight in enumerate(old):
            replace_weight(experts.down(expert), weight)
    return Refitted(share(before, whole), share(after if changed else before, whole), changed)


def _improved(
    experts: PlainExperts, expert: int, old: Tensor, routed: Sequence[Routed], left: Sequence[Tensor], ridge: float
) -> Tensor | None:
    """Equation 3 for one expert, (hidden, width) float32; None if no token chose it."""
    gram, cross = (old.new_zeros(rows, old.shape[1], dtype=torch.float64) for rows in (old.shape[1], old.shape[0]))
    for each, missed in zip(routed, left, strict=True):
        token, weighted = _weighted(experts, expert, each)
        if len(token):
            gram += weighted.T @ weighted
            cross += missed[token].T @ weighted
    distributed.total(gram)
    distributed.total(cross)
    eps = ridge * gram.diagonal().mean()
    now = experts.down(expert).weight.detach().float()
    return now + solved(gram, cross + eps * (old - now), eps) if eps > 0 else None


def _replace(experts: PlainExperts, expert: int, new: Tensor, routed: Sequence[Routed], left: Sequence[Tensor]) -> None:
    """Give an expert another output projection; `left` follows it."""
    down = experts.down(expert)
    now = down.weight.detach().float()
    replace_weight(down, new)
    change = (down.weight.detach().float() - now).T
    for each, missed in zip(routed, left, strict=True):
        token, weighted = _weighted(experts, expert, each)
        missed[token] -= weighted @ change


def _weighted(experts: PlainExperts, expert: int, each: Routed) -> tuple[Tensor, Tensor]:
    """(numbers of an expert's tokens, g a of each, (tokens, width) float32)."""
    token, place = torch.where(each.chosen == expert)
    inner = experts.inner(expert, each.hidden[token]).float()
    return token, inner * each.weights[token, place, None].float()


def solved(gram: Tensor, right: Tensor, eps: Tensor) -> Tensor:
    """`right` (gram + eps I)^-1, (rows, width) float32 for float64; raises NumericalError if that is no number."""
    factor, info = in_one_thread(
        torch.linalg.cholesky_ex, gram + eps * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    )
    if int(info):
        raise NumericalError(
            "second moments of the inputs of an expert, or of the router, are not positive definite; pass a larger --ridge, or "
            "--no-refit and --no-refit-router"
        )
    half = torch.linalg.solve_triangular(factor, right.T, upper=False)
    found: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return found.T.float()
