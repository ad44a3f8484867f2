"""Round column by column, passing each column's error on to the columns not yet rounded.

The recursion of GPTQ (arXiv 2210.17323, equations 2 and 3, section 3.3): with H = X^T X + damping and H^-1 = U^T U,
U upper triangular, for i = 1 .. in:

    Q_i = round(W_i)                                   on the fixed grid of i's group
    e_i = (W_i - W'(Q_i)) / U[i, i]                                                              (2)
    W_j <- W_j - e_i U[i, j]                           for all j > i                             (3)

symbol  meaning                                 shape        name here
W       weights, changed as the loop runs       (out, in)    weight
H       second moments of the inputs            (in, in)     hessian
U       Cholesky factor of H^-1                 (in, in)     factor
e       scaled errors                           (out, in)    errors

Updates are lazy: immediate within a panel of columns, once per panel for the columns after it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.errors import NumericalError
from compresskit.numerics.factorised import in_one_thread
from compresskit.numerics.grid import Grid, from_codes
from compresskit.numerics.scheme import Scheme

PANEL = 128
"""Columns between two updates of the remaining columns (the paper's B)."""


class Rounded(NamedTuple):
    """Result of the recursion."""

    codes: Tensor
    """(out, in) whole numbers or small floats, float32."""
    targets: Tensor
    """(out, in) float32: each weight just before it was rounded, with all earlier errors passed on."""


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """U of H^-1 = U^T U. hessian (in, in); `damping` is a share of its mean diagonal.

    With J the order reversal, J H J = L L^T gives U = (J L J)^-1: one factorisation and one triangular inverse.

    Returns:
        (in, in) float32, upper triangular.

    Raises:
        NumericalError: the damped matrix is not positive definite.
    """
    # Each matrix is freed once the next exists: for 8,192 inputs one takes half a gigabyte.
    reversed_hessian = hessian.flip(0, 1).double()
    del hessian
    mean = reversed_hessian.diagonal().mean()
    reversed_hessian.diagonal().add_(damping * mean.clamp_min(torch.finfo(torch.float32).tiny))
    lower, failed = in_one_thread(torch.linalg.cholesky_ex, reversed_hessian)
    if int(failed):
        raise NumericalError(f"the inputs' second moments are not positive definite at pivot {int(failed)}; raise the damping")
    del reversed_hessian
    identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
    del lower, identity
    return inverse.float().flip(0, 1)


def _reordered(hessian: Tensor, order: Tensor) -> Tensor:
    """Reorder the second moments by column, (in, in), and set the diagonal of always-zero inputs to 1."""
    found = hessian[order][:, order]
    found.diagonal()[found.diagonal() <= 0] = 1
    return found


def round_with_feedback(weight: Tensor, hessian: Tensor, grid: Grid, scheme: Scheme, damping: float, ordered: bool) -> Rounded:
    """Round a linear on a fixed grid. weight (out, in), hessian (in, in).

    `ordered` takes columns with the largest second moment first (act-order). The grid belongs to the columns in stored order,
    so groups stay intact. Inputs that are always 0 are rounded to nearest and pass no error on.

    Returns:
        Codes and targets, (out, in) float32 each, in the stored order of the columns.

    Raises:
        NumericalError: the damped second moments are not positive definite.
    """
    columns = weight.shape[1]
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True, stable=True) if ordered else torch.arange(columns, device=weight.device)
    factor = inverse_factor(_reordered(hessian, order), damping)
    group = order // scheme.group_size if scheme.group_size else torch.zeros_like(order)
    rest = weight.float()[:, order]
    codes, targets = torch.empty_like(rest), torch.empty_like(rest)
    scale, zero_point = grid.scale.T.contiguous(), grid.zero_point.T.contiguous()
    of_column = group.tolist()
    for start in range(0, columns, PANEL):
        stop = min(start + PANEL, columns)
        panel = rest[:, start:stop].T.contiguous()  # (panel, out): a column is contiguous
        local = factor[start:stop, start:stop]
        errors, panel_codes = torch.empty_like(panel), torch.empty_like(panel)
        for i in range(stop - start):
            s, z = scale[of_column[start + i]], zero_point[of_column[start + i]]
            code = scheme.nearest(panel[i] / s, z)
            panel_codes[i] = code
            errors[i] = (panel[i] - (code - z) * s) / local[i, i]
            if i + 1 < stop - start:
                panel[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        codes[:, start:stop], targets[:, start:stop] = panel_codes.T, panel.T
        rest[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)
    back = order.argsort()
    return Rounded(codes[:, back], targets[:, back])


def relative_output_error(weight: Tensor, codes: Tensor, hessian: Tensor, grid: Grid, scheme: Scheme) -> float:
    """||(W - W') X^T||^2 over ||W X^T||^2: the relative squared output error on the calibration inputs.

    weight and codes (out, in), hessian (in, in) or any positive multiple of it.

    Returns:
        A share of the output's energy; 0 if that is zero.
    """
    difference = weight.float() - from_codes(codes, grid, scheme)
    energy = float(((weight.float() @ hessian) * weight).sum(dim=1).sum())
    return float(((difference @ hessian) * difference).sum(dim=1).sum()) / energy if energy > 0 else 0.0
