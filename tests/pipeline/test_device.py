"""Sizes and devices as users write them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compresskit.errors import RequestError
from compresskit.opening import open_model
from compresskit.pipeline.device import choose_device, parse_bytes


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("1.5 kb", 1500), ("2MiB", 2 << 20), ("17", 17)])
def test_sizes_are_read_as_written(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5 apples", "-1GB", "0", "1e3"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not a size"):
        parse_bytes(text)


def test_the_cpu_computes_in_float32_unless_told_otherwise(tiny: dict[str, Path]) -> None:
    model = open_model(tiny["llama"])
    assert choose_device("cpu", "auto", model) == (torch.device("cpu"), torch.float32)
    assert choose_device("cpu", "bfloat16", model) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(RequestError, match="--device cuda:99"):
        choose_device("cuda:99", "auto", model)
