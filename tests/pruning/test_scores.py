"""Every criterion against its formula written out channel by channel. Oracle tests."""

from __future__ import annotations

import pytest
import torch

from compresskit.models.pair import kept_channels
from compresskit.pruning.cfsp import shares_score
from compresskit.pruning.channels import Channels
from compresskit.pruning.flap import fluctuation, output_bias
from compresskit.pruning.magnitude import weight_norms
from compresskit.pruning.random import Random
from compresskit.pruning.walk import bitmask
from compresskit.pruning.wanda_sp import weighted_norms

WIDTH, HIDDEN, TOKENS = 7, 4, 50


@pytest.fixture
def ffn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(WIDTH, HIDDEN, generator=generator) for _ in range(2))
    return gate, up, torch.randn(HIDDEN, WIDTH, generator=generator), torch.randn(TOKENS, WIDTH, generator=generator)


Ffn = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def test_cfsp_shares_sum_over_the_three_matrices(ffn: Ffn) -> None:
    gate, up, down, x = ffn
    norm = [float(x[:, j].norm()) for j in range(WIDTH)]
    masses = [
        [float(down[:, j].abs().sum()) * norm[j] for j in range(WIDTH)],
        [float(up[j].abs().sum()) for j in range(WIDTH)],
        [float(gate[j].abs().sum()) for j in range(WIDTH)],
    ]
    expected = [sum(mass[j] / sum(mass) for mass in masses) * norm[j] for j in range(WIDTH)]
    assert shares_score([gate, up], down, x.norm(dim=0)).tolist() == pytest.approx(expected, rel=1e-5)


def test_wanda_sp_is_the_mean_of_weights_times_norms(ffn: Ffn) -> None:
    _, _, down, x = ffn
    expected = [sum(abs(float(down[i, j])) * float(x[:, j].norm()) for i in range(HIDDEN)) / HIDDEN for j in range(WIDTH)]
    assert weighted_norms(down, x.norm(dim=0)).tolist() == pytest.approx(expected, rel=1e-5)


def test_flap_is_the_variance_times_the_squared_column(ffn: Ffn) -> None:
    _, _, down, x = ffn
    expected = [float(x[:, j].var(correction=0)) * float(down[:, j].norm()) ** 2 for j in range(WIDTH)]
    assert fluctuation(x.var(dim=0, correction=0), down).tolist() == pytest.approx(expected, rel=1e-5)


def test_flaps_bias_makes_the_mean_output_exact(ffn: Ffn) -> None:
    _, _, down, x = ffn
    kept = torch.tensor([0, 2, 5])
    new = torch.randn(HIDDEN, 3, generator=torch.Generator().manual_seed(1))
    pruned = x[:, kept] @ new.T + output_bias(x.mean(dim=0), down, kept, new)
    assert torch.allclose(pruned.mean(dim=0), (x @ down.T).mean(dim=0), atol=1e-5)


def test_magnitude_adds_the_norms_of_the_matrices(ffn: Ffn) -> None:
    gate, up, down, _ = ffn
    expected = [float(gate[j].norm() + up[j].norm() + down[:, j].norm()) for j in range(WIDTH)]
    assert weight_norms([gate, up], down).tolist() == pytest.approx(expected, rel=1e-5)


def test_random_draws_differ_between_networks_and_repeat_themselves(ffn: Ffn) -> None:
    gate, up, down, _ = ffn
    draws = [
        Random().channel_scores(Channels((gate, up), down, None, b, m)).tolist() for b, m in [(0, 0), (0, 1), (1, 0), (0, 0)]
    ]
    assert draws[0] == draws[3]
    assert draws[0] != draws[1] != draws[2] != draws[0]


@pytest.mark.parametrize("width", [1, 4, 9, 64])
def test_the_bitmask_of_kept_channels_can_be_read_back(width: int) -> None:
    kept = torch.randperm(width)[: max(1, width // 2)].sort().values
    assert kept_channels(bitmask(kept, width)) == kept.tolist()
