"""pruning/allocation.py: it meets its target and never asks for more than there is (property); the paper's formula (oracle)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.pruning.allocation import Group, cfsp_ratios, global_ratios, round_widths, uniform_widths

importances = st.lists(st.floats(0, 1), min_size=1, max_size=40)
sparsities = st.floats(0, 0.95)


@given(importances, sparsities)
def test_cfsp_ratios_average_to_the_asked_share_and_stay_within_one(values: list[float], sparsity: float) -> None:
    ratios = cfsp_ratios(values, sparsity)
    assert math.isclose(sum(ratios) / len(ratios), 1 - sparsity, rel_tol=1e-9)
    assert all(0 <= ratio <= 1 for ratio in ratios)


@given(importances, sparsities)
def test_a_more_important_block_never_keeps_less(values: list[float], sparsity: float) -> None:
    ratios = cfsp_ratios(values, sparsity)
    ordered = [ratio for _, ratio in sorted(zip(values, ratios, strict=True))]
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(ordered))


def test_cfsp_ratios_are_the_released_codes_where_nothing_is_clipped() -> None:
    """The released code sums over 128 x 1024 tokens and divides by 1e4."""
    values = [0.10, 0.12, 0.30, 0.11]
    sums = [value * 128 * 1024 / 1e4 for value in values]
    sigmoids = [1 / (1 + math.exp(-(s - sum(sums) / 4))) for s in sums]
    expected = [s / (sum(sigmoids) / 4) * 0.5 for s in sigmoids]
    assert cfsp_ratios(values, 0.5) == pytest.approx(expected)


@given(
    st.lists(st.tuples(st.integers(8, 400), st.integers(1, 8), st.floats(0.05, 1)), min_size=1, max_size=30),
    st.sampled_from([1, 4, 8]),
)
def test_rounded_widths_are_allowed_and_meet_the_target_within_half_a_step_a_group(
    blocks: list[tuple[int, int, float]], step: int
) -> None:
    groups = [Group(i, width, members) for i, (width, members, _) in enumerate(blocks)]
    ratios = [ratio for _, _, ratio in blocks]
    total = sum(g.width * g.members for g in groups)
    wanted = sum(r * g.width * g.members for r, g in zip(ratios, groups, strict=True))
    widths = round_widths(groups, ratios, step, 1 - wanted / total)
    assert all(0 < w <= g.width and (w % step == 0 or w == g.width) for w, g in zip(widths, groups, strict=True))
    unreachable = sum(max(0.0, step - r * g.width) * g.members for r, g in zip(ratios, groups, strict=True))
    off = abs(sum(w * g.members for w, g in zip(widths, groups, strict=True)) - wanted)
    assert off <= sum(step / 2 * g.members for g in groups) + unreachable + 1e-6


def test_global_ratios_keep_the_best_channels_of_all_blocks() -> None:
    scores = [torch.arange(10.0), torch.arange(10.0) ** 3]
    ratios = global_ratios(scores, 0.5)
    standard = [(s - s.mean()) / s.std() for s in scores]
    best = torch.cat(standard).topk(10).values.min()
    assert ratios == pytest.approx([float((s >= best).float().mean()) for s in standard])


@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.3, 0.5, 0.9])
def test_uniform_widths_are_alike_and_nearest(sparsity: float) -> None:
    widths = uniform_widths([Group(i, 1536) for i in range(4)], sparsity, 32)
    assert len(set(widths)) == 1
    assert abs(widths[0] - 1536 * (1 - sparsity)) <= 16
