"""pruning/walk.py: the mask of kept channels can be read back. Property test."""

from __future__ import annotations

import pytest
import torch

from compresskit.models.prunings import kept_channels
from compresskit.pruning.walk import bitmask


@pytest.mark.parametrize("width", [1, 4, 9, 64])
def test_the_bitmask_of_kept_channels_can_be_read_back(width: int) -> None:
    kept = torch.randperm(width)[: max(1, width // 2)].sort().values
    assert kept_channels(bitmask(kept, width)) == kept.tolist()
