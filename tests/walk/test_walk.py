"""walk/walk.py: unedited, it computes exactly what the stock model computes, and frees what it read. Oracle, property tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY
from transformers import AutoModelForCausalLM

from compresskit.machine.device import Where
from compresskit.models.load import open_model
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
