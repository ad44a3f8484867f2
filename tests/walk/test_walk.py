"""The walk is faithful: unedited, it computes exactly what the stock model computes. Oracle and property tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY
from transformers import AutoModelForCausalLM

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk.statistics import Moments
from compresskit.walk.walk import Walk

CPU = torch.device("cpu")


def tokens(samples: int = 3, length: int = 40) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unedited_walk_gives_the_stock_models_logits(family: str, tiny: dict[str, Path]) -> None:
    stock = AutoModelForCausalLM.from_pretrained(tiny[family], dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(tokens()).logits
    walk = Walk(open_model(tiny[family]), tokens(), Where(CPU, torch.float32))
    for _ in walk:
        pass
    found = torch.cat([logits for _, _, logits in walk.logits()])
    assert (found - expected).abs().max() < 1e-4


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


def test_a_part_of_a_walk_takes_whole_micro_batches_from_the_start(tiny: dict[str, Path]) -> None:
    walk = Walk(open_model(tiny["llama"]), tokens(samples=5), Where(CPU, torch.float32), micro_batch=2)
    assert [len(batch) for batch in walk.take(3).batches] == [2, 2]
    assert [len(batch) for batch in walk.take(9).batches] == [2, 2, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_walk_has_read_is_freed(family: str, tiny: dict[str, Path]) -> None:
    walk = Walk(open_model(tiny[family]), tokens(), Where(CPU, torch.float32))
    for block in walk:
        others = [p for n, p in walk.network.named_parameters(remove_duplicate=False) if not n.startswith(block.name + ".")]
        assert all(parameter.is_meta for parameter in others)
    for _ in walk.logits():
        pass
    assert all(parameter.is_meta for parameter in walk.network.parameters())
