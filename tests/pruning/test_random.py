"""pruning/random.py: draws differ between networks and repeat themselves. Property test."""

from __future__ import annotations

from feed_forward import Ffn

from compresskit.pruning.channels import Channels
from compresskit.pruning.random import Random


def test_random_draws_differ_between_networks_and_repeat_themselves(ffn: Ffn) -> None:
    gate, up, down, _ = ffn
    draws = [
        Random().channel_scores(Channels((gate, up), down, None, b, m)).tolist() for b, m in [(0, 0), (0, 1), (1, 0), (0, 0)]
    ]
    assert draws[0] == draws[3]
    assert draws[0] != draws[1] != draws[2] != draws[0]
