"""Round column by column, passing each column's error on to the columns not yet rounded.

GPTQ (arXiv 2210.17323, equations 2 and 3) passes errors on by the Cholesky factor of H^-1, H = X^T X + damping. The same
rounding follows from a factor of H itself, in Babai's nearest-plane form, without any inverse. With H = L D L^T, L lower
triangular with a unit diagonal, the error of the outputs is a sum over columns, each of which depends on the columns after
it alone:

    (W - W') H (W - W')^T = sum_i D_i r_i^2,    r = (W - W') L                                   (1)

so for i = in .. 1, the last column first:

    T_i = W_i + sum_j>i (W_j - W'_j) L[j, i]                                                     (2)
    Q_i = round(T_i)                                   on the fixed grid of i's group
    r_i = T_i - W'(Q_i)                                                                          (3)

symbol  meaning                                          shape        name here
W       weights                                          (out, in)    weight
H       second moments of the inputs                     (in, in)     hessian
L       unit Cholesky factor of H, columns in order      (in, in)     lower
D       squares of its diagonal before it was made 1     (in,)        pivots
T       each weight with the errors of others passed on  (out, in)    targets

Equation 3 with equation 1 gives the loss without a product with H. Differs from the released code in the last bits of T
alone: of 10.6 million codes of three blocks of SmolLM2, 1 to 2 in 100,000 differ, in 5 to 9 rows where a tie fell the
other way (docs/evidence/quantize.md).

Panels of columns: errors of the panels before reach a panel in one product, those inside it column by column (panels.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.errors import NumericalError
from compresskit.numerics.factorised import in_one_thread
from compresskit.numerics.grid import Grid
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.panels import round_panel

PANEL = 128
"""Columns that errors reach one by one (the paper's B)."""
ROWS_AT_ONCE = 1024
"""Rows that are rounded together, the piece of work that ranks deal out; also rows of the second moments reordered together."""


class Feedback(NamedTuple):
    """What the inputs' second moments say about passing errors on; one for all linears that share these inputs."""

    order: Tensor
    """(in,) int64: the stored column at each place; the last place is rounded first."""
    lower: Tensor
    """L, (in, in) float32."""
    pivots: Tensor
    """D, (in,) float64, by place."""
    added: Tensor
    """What was added to the diagonal of H, (in,) float64, by place."""


class Rounded(NamedTuple):
    """Result of the recursion."""

    codes: Tensor
    """(out, in) whole numbers or small floats, float32."""
    targets: Tensor
    """(out, in) float32: each weight just before it was rounded, with all earlier errors passed on."""
    losses: Tensor
    """(out,) float64: the squared error of every output, equation 1 without the damping, in the unit of the second moments."""


def feedback(hessian: Tensor, damping: float, ordered: bool) -> Feedback:
    """Factorise second moments (in, in) of any positive scale.

    `damping` is a share of their mean diagonal. `ordered` rounds columns with the largest second moment first (act-order).
    Inputs that are always 0 get a diagonal of 1, so that they pass no error on.

    Returns:
        The factor, with the order of its columns.

    Raises:
        NumericalError: the damped matrix is not positive definite.
    """
    diagonal = hessian.diagonal().double()
    columns = torch.arange(len(hessian), device=hessian.device)
    order = (diagonal.argsort(descending=True, stable=True) if ordered else columns).flip(0)
    matrix = torch.empty_like(hessian, dtype=torch.float64)
    for places in torch.split(columns, ROWS_AT_ONCE):
        # Only the half that is read: the upper one, of what is transposed below.
        start = int(places[0])
        matrix[places, start:] = hessian.index_select(0, order[places]).index_select(1, order[start:]).double()
    added = (diagonal <= 0)[order].double() - diagonal.clamp_max(0)[order]
    mean = (diagonal.clamp_min(0).sum() + (diagonal <= 0).sum()) / len(diagonal)
    added += damping * mean.clamp_min(torch.finfo(torch.float32).tiny)
    matrix.diagonal().add_(added)
    matrix = matrix.mT  # symmetric: transposed it has LAPACK's memory order and is factored in place
    failed = torch.empty((), dtype=torch.int32, device=hessian.device)
    in_one_thread(torch.linalg.cholesky_ex, matrix, out=(matrix, failed))
    if int(failed):
        raise NumericalError(f"the inputs' second moments are not positive definite at pivot {int(failed)}; raise the damping")
    diagonal = matrix.diagonal().clone()
    matrix /= diagonal
    return Feedback(order, matrix.float(), diagonal.square(), added)


def round_with_feedback(weight: Tensor, found: Feedback, grid: Grid, scheme: Scheme) -> Rounded:
    """Round a linear on a fixed grid. weight (out, in), `found`: of its inputs.

    The grid belongs to the columns in stored order, so groups stay intact.

    Returns:
        Codes and targets, (out, in) float32 each, in the stored order of the columns, and the loss of every row.
    """
    codes, targets = (torch.empty(weight.shape, device=weight.device) for _ in range(2))
    losses = torch.empty(len(weight), dtype=torch.float64, device=weight.device)
    for rows in distributed.pieces(len(weight), ROWS_AT_ONCE):
        part = Grid(grid.scale[rows], grid.zero_point[rows])
        codes[rows], targets[rows], losses[rows] = _rounded_rows(weight[rows], found, part, scheme)
    distributed.exchange(ROWS_AT_ONCE, codes, targets, losses)
    return Rounded(codes, targets, losses)


def _rounded_rows(weight: Tensor, found: Feedback, grid: Grid, scheme: Scheme) -> Rounded:
    """`round_with_feedback` of some rows."""
    group = found.order // scheme.group_size if scheme.group_size else torch.zeros_like(found.order)
    given = columns_in_order(weight, found)
    codes, targets, errors = (torch.empty_like(given) for _ in range(3))
    losses = torch.zeros(weight.shape[0], dtype=torch.float64, device=weight.device)
    scale, zero_point = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()
    pivots, added = found.pivots.float(), found.added.float()
    for stop in range(len(given), 0, -PANEL):
        panel = slice(max(0, stop - PANEL), stop)
        torch.addmm(given[panel], found.lower[stop:, panel].T, errors[stop:], out=targets[panel])
        steps = scale[group[panel]], zero_point[group[panel]]
        round_panel(
            given[panel], found.lower[panel, panel].contiguous(), steps, scheme, (codes[panel], targets[panel], errors[panel])
        )
        # Equation 3: the given weight is off by W - W', its target by what was passed on as well.
        missed = targets[panel] - given[panel] + errors[panel]
        losses += (pivots[panel] @ missed.square_()).double() - (added[panel] @ errors[panel].square()).double()
    back = found.order.argsort()
    return Rounded(codes[back].T, targets[back].T, losses.clamp_min_(0))


def columns_in_order(weight: Tensor, found: Feedback) -> Tensor:
    """The columns of a weight (out, in) as rows in the order of the factor, (in, out) float32."""
    return weight.float().T.contiguous().index_select(0, found.order)
