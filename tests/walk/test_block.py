"""walk/block.py: what is collected, and an attention that is kept instead of computed twice. Property tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk.statistics import Moments
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")


def tokens(samples: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_collecting_sees_every_token_of_every_feed_forward_network(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    for block in Walk(model, tokens(), Where(CPU, torch.float32)):
        for group in model.ffn_groups(block.index):
            norms = {ffn.out_projection: Moments(group.width) for ffn in group.members}
            block.collect(norms)
            seen = sum(norm.tokens for norm in norms.values())
            routed = 2 if len(group.members) > 1 else 1
            assert seen == routed * tokens().numel()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_the_attention_does_not_change_what_a_block_gives(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    plain, kept = (Walk(model, tokens(), Where(CPU, torch.float32), micro_batch=1) for _ in range(2))
    for one, other in zip(plain, kept, strict=True):
        out = model.ffn_groups(one.index)[0].members[0].out_projection
        other.collect({out: Moments(model.linear_shape(out)[1])}, attention_is_final=True)
        assert len(other.remembered) == len(tokens())
        for (_, expected), (_, found) in zip(one.steps(), other.steps(), strict=True):
            assert torch.equal(expected, found)
        assert other.remembered == []
