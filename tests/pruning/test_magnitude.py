"""pruning/magnitude.py: the score against its formula written out channel by channel. Oracle."""

from __future__ import annotations

import pytest
from feed_forward import WIDTH, Ffn

from compresskit.pruning.magnitude import weight_norms


def test_magnitude_adds_the_norms_of_the_matrices(ffn: Ffn) -> None:
    gate, up, down, _ = ffn
    expected = [float(gate[j].norm() + up[j].norm() + down[:, j].norm()) for j in range(WIDTH)]
    assert weight_norms([gate, up], down).tolist() == pytest.approx(expected, rel=1e-5)
