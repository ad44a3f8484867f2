"""numerics/rows.py: rows of several projections in one matrix are found by their number, and put back. Oracle, property."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.numerics.rows import join_rows, split_rows

SIZES = st.integers(1, 5), st.integers(1, 7)


@given(*SIZES, st.booleans())
def test_row_i_of_a_part_is_found_by_its_number(count: int, width: int, interleaved: bool) -> None:
    parts = split_rows(torch.arange(count * width)[:, None], count, interleaved)
    for number, part in enumerate(parts):
        rows = [row * count + number if interleaved else number * width + row for row in range(width)]
        assert part[:, 0].tolist() == rows
    assert len(parts) == count


@given(*SIZES, st.booleans(), st.booleans())
def test_joining_undoes_splitting(count: int, width: int, interleaved: bool, is_bias: bool) -> None:
    whole = torch.randn(count * width) if is_bias else torch.randn(count * width, 3)
    assert torch.equal(join_rows(split_rows(whole, count, interleaved), interleaved), whole)
