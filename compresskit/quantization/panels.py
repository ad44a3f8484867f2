"""The columns of a panel, rounded one after the other; error_feedback.py has the equations and the symbols.

A column of the weight is a row here. With whole-number codes Q - z is what is rounded, so that a column takes six small
operations. On a GPU even these wait for each other's launch; there panel_kernel.py does all columns in one.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from compresskit.numerics.fixed_scheme import FixedScheme
from compresskit.numerics.scheme import Scheme

Steps = tuple[Tensor, Tensor]
"""Scale and zero point of every weight, (panel, out) float32 each."""
Results = tuple[Tensor, Tensor, Tensor]
"""Codes, targets and errors W - W', (panel, out) float32 each, to be filled; the targets come with what is passed on so far."""


def round_panel(given: Tensor, lower: Tensor, steps: Steps, scheme: Scheme, results: Results) -> None:
    """Equations 2 and 3 inside a panel, its last column first. given (panel, out): W. lower (panel, panel): L."""
    if isinstance(scheme, FixedScheme) and scheme.element != "int8":
        _round_small_floats(given, lower, steps, scheme, results)
    elif given.device.type == "cuda" and find_spec("triton"):
        from compresskit.quantization.panel_kernel import round_panel_at_once

        round_panel_at_once(given, lower, steps, scheme, results)
    else:
        round_whole_numbers(given, lower, steps, scheme, results)


def round_whole_numbers(given: Tensor, lower: Tensor, steps: Steps, scheme: Scheme, results: Results) -> None:
    """`round_panel` for integer codes. Q - z = clamp(round(T / s), lowest - z, highest - z) is exact: all are whole numbers."""
    (scale, zero_point), (codes, targets, errors) = steps, results
    columns = (given, scale, scheme.lowest - zero_point, scheme.highest - zero_point, codes, targets, errors)
    rounded = torch.empty_like(given[0])
    for i, (weight, step, low, high, code, target, error) in reversed(list(enumerate(zip(*columns, strict=True)))):
        torch.div(target, step, out=code)
        torch.clamp(code.round_(), low, high, out=code)
        torch.sub(weight, torch.mul(code, step, out=rounded), out=error)
        if i:
            targets[:i].addr_(lower[i, :i], error)
    codes += zero_point


def _round_small_floats(given: Tensor, lower: Tensor, steps: Steps, scheme: Scheme, results: Results) -> None:
    """`round_panel` for any codes, by `scheme.nearest`."""
    (scale, zero_point), (codes, targets, errors) = steps, results
    for i in range(len(given) - 1, -1, -1):
        codes[i] = scheme.nearest(targets[i] / scale[i], zero_point[i])
        torch.sub(given[i], (codes[i] - zero_point[i]).mul_(scale[i]), out=errors[i])
        if i:
            targets[:i].addr_(lower[i, :i], errors[i])
