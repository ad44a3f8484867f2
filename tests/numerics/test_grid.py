"""numerics/grid.py: against a written-out definition. Oracle and property tests."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.numerics.grid import from_codes, min_max_grid, to_codes
from compresskit.numerics.grid_search import rounding_error, searched_grid
from compresskit.numerics.scheme import Scheme

SCALES = {torch.float16: "F16", torch.bfloat16: "BF16"}
schemes = st.builds(Scheme, st.integers(2, 8), st.sampled_from([0, 4, 8, 16]), st.booleans())


def random_weight(seed: int, rows: int, columns: int) -> torch.Tensor:
    """With a spread of magnitudes, some groups all zero and some of one sign."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).pow(4)
    weight[::3, : columns // 2] = 0
    weight[1::3] = weight[1::3].abs()
    return weight


@given(schemes, st.integers(0, 999), st.integers(1, 9), st.sampled_from([16, 48]), st.sampled_from(list(SCALES)))
def test_every_weight_gets_the_nearest_point_of_its_groups_grid(
    scheme: Scheme, seed: int, rows: int, columns: int, dtype: torch.dtype
) -> None:
    weight = random_weight(seed, rows, columns)
    grid = min_max_grid(weight, scheme, dtype)
    found = from_codes(to_codes(weight, grid, scheme), grid, scheme)
    size = scheme.group_size or columns
    for row in range(rows):
        for column in range(columns):
            scale, zero = float(grid.scale[row, column // size]), float(grid.zero_point[row, column // size])
            points = [scale * (code - zero) for code in range(scheme.lowest, scheme.highest + 1)]
            nearest = min(abs(point - float(weight[row, column])) for point in points)
            assert abs(abs(float(found[row, column] - weight[row, column])) - nearest) <= 1e-5 * scale


@given(schemes, st.integers(0, 999))
def test_the_grid_spans_its_group_and_holds_zero(scheme: Scheme, seed: int) -> None:
    weight = random_weight(seed, 6, 16)
    grid = min_max_grid(weight, scheme, torch.float16)
    assert bool((grid.zero_point == grid.zero_point.round()).all())
    assert bool(((grid.zero_point >= scheme.lowest) & (grid.zero_point <= scheme.highest)).all())
    assert torch.equal(grid.scale, grid.scale.half().float())
    error = (from_codes(to_codes(weight, grid, scheme), grid, scheme) - weight).abs()
    largest = grid.scale.repeat_interleave(scheme.group_size or 16, dim=1)
    # Half a step; a whole one at the ends, where the zero point was rounded.
    assert bool((error <= largest * 1.02).all())


@given(schemes, st.integers(0, 999), st.booleans())
def test_the_search_never_ends_with_a_larger_error(scheme: Scheme, seed: int, weighted: bool) -> None:
    weight = random_weight(seed, 5, 16)
    importance = torch.rand(16, generator=torch.Generator().manual_seed(seed)) if weighted else None
    full, found = min_max_grid(weight, scheme, torch.float16), searched_grid(weight, scheme, torch.float16, importance)
    errors = [rounding_error(weight, grid, scheme, importance) for grid in (full, found)]
    assert bool((errors[1] <= errors[0]).all())
