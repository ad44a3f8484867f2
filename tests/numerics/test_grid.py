"""The grid against a written-out definition; codes survive the files bit for bit. Oracle and property tests."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.formats.compressed_tensors import plan, stored_linear
from compresskit.numerics.grid import Grid, from_codes, min_max_grid, rounding_error, searched_grid, to_codes
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
    # Half a step; a whole one at the ends, where the zero point was rounded; float16 has no smaller scale than 6.1e-5.
    assert bool((error <= largest * 1.02).all())


@given(schemes, st.integers(0, 999), st.integers(1, 40), st.sampled_from([16, 48]), st.sampled_from(list(SCALES)))
def test_files_hold_the_codes_bit_for_bit(scheme: Scheme, seed: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Unpacked by reading the bits of the words one by one."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (rows, columns), generator=generator).float()
    zero = torch.randint(scheme.lowest, scheme.highest + 1, (rows, groups), generator=generator).float()
    zero = torch.zeros_like(zero) if scheme.symmetric else zero
    grid = Grid(torch.rand(rows, groups, generator=generator).add(0.1).to(dtype).float(), zero)
    tensors, weight = stored_linear(codes, grid, scheme, dtype)
    assert {spec.name: spec.shape for spec in plan("x", (rows, columns), scheme, SCALES[dtype])} == {
        f"x.{leaf}": tuple(tensor.shape) for leaf, tensor in tensors.items()
    }
    assert bits_of(tensors["weight_packed"], scheme, columns) == codes.int().tolist()
    if not scheme.symmetric:
        assert bits_of(tensors["weight_zero_point"].T, scheme, rows) == zero.T.int().tolist()
    exact = (codes - zero.repeat_interleave(columns // groups, 1)).to(dtype) * grid.scale.to(dtype).repeat_interleave(
        columns // groups, 1
    )
    assert torch.equal(weight, exact.float())


def bits_of(packed: torch.Tensor, scheme: Scheme, count: int) -> list[list[int]]:
    rows = []
    for words in packed.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        mask = (1 << scheme.bits) - 1
        rows.append([((stream >> (scheme.bits * i)) & mask) + scheme.lowest for i in range(count)])
    return rows


@given(schemes, st.integers(0, 999), st.booleans())
def test_the_search_never_ends_with_a_larger_error(scheme: Scheme, seed: int, weighted: bool) -> None:
    weight = random_weight(seed, 5, 16)
    importance = torch.rand(16, generator=torch.Generator().manual_seed(seed)) if weighted else None
    full, found = min_max_grid(weight, scheme, torch.float16), searched_grid(weight, scheme, torch.float16, importance)
    errors = [rounding_error(weight, grid, scheme, importance) for grid in (full, found)]
    assert bool((errors[1] <= errors[0]).all())


def test_stored_bits_count_codes_scales_and_zero_points() -> None:
    expectations = {Scheme(3, 64, True): 3.25, Scheme(2, 64, False): 2 + 18 / 64, Scheme(4, 0, True): 4 + 16 / 512}
    for scheme, expected in expectations.items():
        specs = plan("x", (256, 512), scheme, "F16")
        assert sum(s.bytes for s in specs if not s.name.endswith("shape")) * 8 / (256 * 512) == expected
