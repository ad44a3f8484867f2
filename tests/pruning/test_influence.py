"""pruning/influence.py: against the angle that it is (oracle)."""

from __future__ import annotations

import math

import pytest
import torch

from compresskit.pruning.influence import AngularDistance


@pytest.mark.parametrize(("angle", "expected"), [(0.0, 0.0), (math.pi / 2, 0.5), (math.pi, 1.0), (math.pi / 3, 1 / 3)])
def test_the_angular_distance_is_the_angle_over_pi(angle: float, expected: float) -> None:
    distance = AngularDistance()
    distance.add(torch.tensor([[1.0, 0.0]]), torch.tensor([[3 * math.cos(angle), 3 * math.sin(angle)]]))
    assert distance.mean == pytest.approx(expected, abs=1e-3)


def test_angular_distances_add_up_over_tokens() -> None:
    before, after = torch.randn(8, 6), torch.randn(8, 6)
    whole, parts = AngularDistance(), AngularDistance()
    whole.add(before, after)
    parts.add(before[:3], after[:3])
    parts.add(before[3:], after[3:])
    assert parts.mean == pytest.approx(whole.mean)
