"""machine/device.py: devices and precisions as users write them. Against hand-written expectations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compresskit.errors import RequestError
from compresskit.machine.device import Where, choose_device
from compresskit.models.load import open_model


def test_the_cpu_computes_in_float32_unless_told_otherwise(tiny: dict[str, Path]) -> None:
    stored = open_model(tiny["llama"]).checkpoint.dtypes
    assert choose_device("cpu", "auto", stored) == Where(torch.device("cpu"), torch.float32, False)
    assert choose_device("cpu", "bfloat16", stored, True) == Where(torch.device("cpu"), torch.bfloat16, True)
    with pytest.raises(RequestError, match="--device cuda:99"):
        choose_device("cuda:99", "auto", stored)
