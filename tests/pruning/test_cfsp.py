"""pruning/cfsp.py: the score against its formula written out channel by channel. Oracle."""

from __future__ import annotations

import pytest
from feed_forward import WIDTH, Ffn

from compresskit.pruning.cfsp import shares_score


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
