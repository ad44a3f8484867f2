"""evaluation/memory.py: memory is counted as it is used. Property tests."""

from __future__ import annotations

import torch

from compresskit.evaluation.memory import LiveTensors, weight_bytes


def test_live_tensors_counts_what_is_alive_at_the_same_time() -> None:
    x = torch.zeros(1000)
    with LiveTensors() as tensors:
        y = x + 1
        view = y[:10]
        y.add_(1)
        del y
        assert tensors.live == 4000
        del view
        assert tensors.live == 0
        first = x + 1
        second = x + first
    assert (tensors.live, tensors.peak) == (8000, 8000)
    del first, second
    assert tensors.live == 0


def test_tied_weights_count_once() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    assert weight_bytes(network) == 512
    network[1].weight = network[0].weight
    assert weight_bytes(network) == 256
