"""Correct the scores by what trials measured: one factor for each kind of unit and each number of bits.

    KL(a) ~= sum_u gamma_k(u, a_u) c(u, a_u),      k: the unit's place in its block, and the bits of its option      (1)

Equation 1 of scoring.py holds for small errors that do not go together. Those of 2 bits are neither: they cost more than it
says against those of 4. The factors are the least squares of the relative errors over all trials so far, held near one
common factor:

    minimise sum_i (KL'(a_i) / KL(a_i) - 1)^2 + RIDGE sum_k (gamma_k / gamma - 1)^2                            (2)

with gamma the best common factor. No factor falls below a part of it, so that no option ever looks free.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

from compresskit.searching.knapsack import Assignment, Table

RIDGE = 0.5
"""In trials: so much does a relative error of the common factor count."""
LEAST_SHARE = 0.1

Kinds = Sequence[Sequence[Hashable]]
"""The kind of every option of every unit."""


def corrected(costs: Table, kinds: Kinds, trials: Mapping[Assignment, float]) -> list[list[float]]:
    """The scores times their factors, equation 1. `trials`: measured KL in nats a token, by assignment.

    Returns:
        A cost for each option of each unit; as they were where no trial has a loss.
    """
    import torch

    names = sorted({kind for row in kinds for kind in row}, key=str)
    place = {name: number for number, name in enumerate(names)}
    rows = []
    for assignment, loss in trials.items():
        if loss > 0:
            row = [0.0] * len(names)
            for unit, option in enumerate(assignment):
                row[place[kinds[unit][option]]] += costs[unit][option] / loss
            rows.append(row)
    if not rows:
        return [list(row) for row in costs]
    shares = torch.tensor(rows, dtype=torch.float64)
    together = shares.sum(dim=1)
    common = float(together.sum() / together.square().sum().clamp_min(torch.finfo(torch.float64).tiny))
    scaled = shares * common  # factors relative to the common one, which are 1 without trials
    normal = scaled.T @ scaled + RIDGE * torch.eye(len(names), dtype=torch.float64)
    found = torch.linalg.solve(normal, scaled.sum(dim=0) + RIDGE).clamp_min(LEAST_SHARE) * common
    factors = dict(zip(names, found.tolist(), strict=True))
    return [
        [cost * factors[kind] for cost, kind in zip(row, kind_row, strict=True)]
        for row, kind_row in zip(costs, kinds, strict=True)
    ]
