"""pruning/wanda_sp.py: the score against its formula written out channel by channel. Oracle."""

from __future__ import annotations

import pytest
from feed_forward import HIDDEN, WIDTH, Ffn

from compresskit.pruning.wanda_sp import weighted_norms


def test_wanda_sp_is_the_mean_of_weights_times_norms(ffn: Ffn) -> None:
    _, _, down, x = ffn
    expected = [sum(abs(float(down[i, j])) * float(x[:, j].norm()) for i in range(HIDDEN)) / HIDDEN for j in range(WIDTH)]
    assert weighted_norms(down, x.norm(dim=0)).tolist() == pytest.approx(expected, rel=1e-5)
