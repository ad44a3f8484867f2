"""models/model.py: the feed-forward networks of every family's blocks. Oracle: the shapes of the built network."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import BLOCKS, FAMILIES

from compresskit.models.load import open_model
from compresskit.models.meta import build


@pytest.mark.parametrize("family", FAMILIES)
def test_every_block_has_its_feed_forward_networks(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    network = build(model)
    for index in range(BLOCKS):
        for group in model.ffn_groups(index):
            assert len(group.members) == (4 if "moe_intermediate" in group.width_key or family == "mixtral" else 1)
            for ffn in group.members:
                assert network.get_submodule(ffn.out_projection).weight.shape == (model.hidden_size, group.width)
                for name in ffn.in_projections:
                    assert network.get_submodule(name).weight.shape == (group.width * group.fused, model.hidden_size)
