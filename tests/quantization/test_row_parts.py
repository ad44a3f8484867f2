"""quantization/row_parts.py: each group of rows is rounded for its own second moments. Oracle and property."""

from __future__ import annotations

import itertools

import torch

from compresskit.numerics.grid import from_codes, min_max_grid
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.error_feedback import feedback, round_with_feedback
from compresskit.quantization.row_parts import round_parts
from compresskit.walk.statistics import Gram

SCHEME = Scheme(2, 0, symmetric=False)


def gram_of(x: torch.Tensor) -> Gram:
    found = Gram(x.shape[1])
    found.add(x)
    return found


def inputs(columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(60, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)


def costs(difference: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Cost dW H dW^T of every row, float64."""
    return (difference.double() @ (x.double().T @ x.double() / len(x)) * difference.double()).sum(dim=1)


def test_the_losses_are_the_traces_with_each_groups_second_moments() -> None:
    weight, streams = torch.randn(11, 24, generator=torch.Generator().manual_seed(0)), [inputs(24, 1), inputs(24, 2)]
    grid = min_max_grid(weight, SCHEME, torch.float32)
    found = round_parts(weight, [(4, gram_of(streams[0])), (7, gram_of(streams[1]))], grid, SCHEME, 0.01, True)
    difference = weight - from_codes(found.codes, grid, SCHEME)
    for rows, x in zip((slice(0, 4), slice(4, 11)), streams, strict=True):
        assert torch.allclose(found.losses[rows], costs(difference[rows], x), rtol=1e-3)
        assert torch.allclose(found.energies[rows], costs(weight[rows], x), rtol=2e-2)


def test_a_row_of_two_weights_is_rounded_as_well_as_the_best_of_all_codes_for_its_own_group() -> None:
    """With two columns whose correlation is small the recursion is exact: the nearest plane is the nearest point."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 2, generator=generator)
    streams = [torch.randn(80, 2, generator=generator) * torch.tensor(each) for each in ([1.0, 6.0], [6.0, 1.0])]
    grid = min_max_grid(weight, SCHEME, torch.float32)
    found = round_parts(weight, [(6, gram_of(each)) for each in streams], grid, SCHEME, 1e-6, True)
    every = torch.tensor(list(itertools.product(range(SCHEME.lowest, SCHEME.highest + 1), repeat=2)), dtype=torch.float32)
    for row in range(12):
        own = grid._replace(scale=grid.scale[row : row + 1], zero_point=grid.zero_point[row : row + 1])
        options = torch.cat([from_codes(each[None], own, SCHEME) for each in every])
        best = costs(weight[row] - options, streams[row // 6]).min()
        assert torch.allclose(found.losses[row], best, rtol=1e-3, atol=1e-6)


def test_equal_second_moments_give_the_plain_rounding_to_the_bit() -> None:
    weight, x = torch.randn(9, 32, generator=torch.Generator().manual_seed(3)), inputs(32, 4)
    grid = min_max_grid(weight, SCHEME, torch.float32)
    found = round_parts(weight, [(5, gram_of(x)), (4, gram_of(x))], grid, SCHEME, 0.01, True)
    plain = round_with_feedback(weight, feedback(gram_of(x).matrix() / len(x), 0.01, True), grid, SCHEME)
    assert torch.equal(found.codes, plain.codes)
