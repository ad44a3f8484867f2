"""`round_panel` of whole-number codes as one Triton kernel: a program for some rows of the weight, a loop over the columns.

The targets of a program stay in its registers. A column is picked from them by a sum over the panel with all others masked.
The kernel's arguments have no types, because Triton takes annotations for its own.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compresskit.numerics.scheme import Scheme

ROWS_OF_A_PROGRAM = 32
"""Rows of the weight in one program: 128 columns of 32 rows are 4,096 numbers, 32 a thread."""
ROUNDING = tl.constexpr(1.5 * 2**23)
"""Added and taken away it rounds a float32 below 2^22 to the nearest whole number, halves to the even one."""


def round_panel_at_once(
    given: Tensor, lower: Tensor, steps: tuple[Tensor, ...], scheme: Scheme, results: tuple[Tensor, ...]
) -> None:
    """As `panels.round_whole_numbers`; all matrices (panel, out) and `lower` (panel, panel) are contiguous float32."""
    columns, rows = given.shape
    grid = (triton.cdiv(rows, ROWS_OF_A_PROGRAM),)
    _kernel[grid](
        given, lower, *steps, *results, columns, rows, scheme.lowest, scheme.highest,
        PANEL=triton.next_power_of_2(columns), BLOCK=ROWS_OF_A_PROGRAM, enable_fp_fusion=False,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913, PLR0917
    given, lower, scale, zero_point, codes, targets, errors, columns, rows, lowest, highest,
    PANEL: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    place = tl.arange(0, PANEL)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    whole = (place < columns)[:, None] & inside[None, :]
    at = place[:, None] * rows + row[None, :]
    passed = tl.load(targets + at, mask=whole, other=0.0)
    for back in range(columns):
        i = columns - 1 - back
        here = i * rows + row
        target = tl.sum(tl.where((place == i)[:, None], passed, 0.0), axis=0)
        step = tl.load(scale + here, mask=inside, other=1.0)
        zero = tl.load(zero_point + here, mask=inside, other=0.0)
        # Clamped first and rounded then is the same, as both ends are whole numbers.
        position = tl.minimum(tl.maximum(tl.div_rn(target, step), lowest - zero), highest - zero)
        code = (position + ROUNDING) - ROUNDING
        error = tl.load(given + here, mask=inside, other=0.0) - code * step
        tl.store(codes + here, code + zero, mask=inside)
        tl.store(errors + here, error, mask=inside)
        passed += tl.load(lower + i * columns + place, mask=place < i, other=0.0)[:, None] * error[None, :]
    tl.store(targets + at, passed, mask=whole)
