"""recovery/training/packing.py: texts of one row come out as each does alone, in every family that packs. Oracle, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_data import options
from tiny_models import FAMILIES, VOCABULARY, make_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Random
from compresskit.recovery.training import packing
from compresskit.recovery.training.batches import TrainingData, collate, order_of, rectangles, rows, steps_of
from compresskit.recovery.training.networks import whole_network

LENGTHS = (9, 1, 30, 14)
PADDED = {"mistral", "gemma2", "gemma3_text"}
"""Families whose tiny models have a window shorter than the longest text."""


def network_of(folder: Path) -> PreTrainedModel:
    return whole_network(open_model(folder), Where(torch.device("cpu"), torch.float32))


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def in_one_row(network: PreTrainedModel, parts: list[Tensor]) -> list[Tensor]:
    positions = torch.cat([torch.arange(len(part)) for part in parts])[None]
    logits = network(input_ids=torch.cat(parts)[None], position_ids=positions, use_cache=False).logits[0]
    return list(torch.split(logits, [len(part) for part in parts]))


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_one_row_come_out_as_each_alone(family: str, tiny: dict[str, Path]) -> None:
    network, parts = network_of(tiny[family]), texts()
    with torch.no_grad():
        alone = [network(input_ids=part[None], use_cache=False).logits[0] for part in parts]
        assert packing.pack(network, max(LENGTHS)) == (family not in PADDED)
        if family in PADDED:
            found = [network(input_ids=part[None], use_cache=False).logits[0] for part in parts]
        else:
            found = in_one_row(network, parts)
    for got, expected in zip(found, alone, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)


def test_gradients_of_one_row_are_the_sum_of_those_of_each_text_alone(tiny: dict[str, Path]) -> None:
    network, parts = network_of(tiny["llama"]), texts()
    weight = network.get_submodule("model.layers.0.self_attn.k_proj").weight.requires_grad_()
    sum(network(input_ids=part[None], use_cache=False).logits.square().sum() for part in parts).backward()
    alone = weight.grad.clone()
    weight.grad = None
    assert packing.pack(network, max(LENGTHS))
    sum(logits.square().sum() for logits in in_one_row(network, parts)).backward()
    assert torch.allclose(weight.grad, alone, rtol=1e-4, atol=1e-5 * float(alone.abs().max()))


def test_a_window_shorter_than_the_texts_is_not_packed(tmp_path: Path) -> None:
    network = network_of(make_model(tmp_path / "mistral", "mistral", sliding_window=16))
    assert packing.pack(network, 16)
    network.set_attn_implementation(packing.STOCK)
    assert not packing.pack(network, 17)
    assert network.config._attn_implementation == packing.STOCK


def test_an_attention_that_is_not_told_where_texts_end_is_found_out(
    tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def deaf(*arguments: Any, **how: Any) -> Any:
        return sdpa_attention_forward(*arguments, **{name: value for name, value in how.items() if name != "position_ids"})

    network = network_of(tiny["llama"])
    monkeypatch.setitem(packing.AttentionInterface._global_mapping, packing.PACKED, deaf)
    assert not packing.pack(network, 12)
    assert network.config._attn_implementation == packing.STOCK


def test_a_row_says_where_each_text_begins_and_learns_the_same_tokens_as_a_rectangle() -> None:
    parts = [part.tolist() for part in texts() if len(part) > 1]
    samples = [Sample(Instruction(i, "file", [], "", ""), part, 3) for i, part in enumerate(parts)]
    learned = {}
    for packed, group in ((True, rows), (False, rectangles)):
        steps = steps_of([len(part) for part in parts], order_of(len(parts), len(parts), 1.0, 1, 0), group)
        learned_data = TrainingData(samples, [False, True, False], steps, None, [0.0] * 3, 1e-3, 0, 20, "float32", packed)
        (batch,) = collate(learned_data, 0)
        assert torch.equal(batch["targets"], batch["tokens"][batch["rows"], batch["kept"][batch["columns"]] + 1])
        learned[packed] = sorted(batch["targets"].tolist())
        if packed:
            assert torch.equal(batch["columns"], torch.arange(len(batch["kept"])))
            assert packing.text_lengths(batch["positions"]) == sorted(map(len, parts), reverse=True)
    assert learned[True] == learned[False]
    assert len(learned[True]) == 6 + 29 + 11


@pytest.mark.parametrize("loss", ["response", "distill"])
def test_packed_rows_are_learned_as_padded_samples_are(
    loss: str, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    losses = []
    for name in ("packed", "padded"):
        weight = 0.0 if loss == "distill" else None  # small losses, whose last digits are seen
        asked = options(tiny["llama"], data, steps=6, loss=loss, data_weight=weight, learning_rate=1e-2, precision="float32")
        recover(Random(budget=0.5), str(damaged), tmp_path / name, asked)
        losses.append(json.loads((tmp_path / name / "recover.json").read_text())["losses"])
        monkeypatch.setattr("compresskit.recovery.training.packing.pack", lambda network, longest: False)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0] != losses[1]  # other sums, so that it is seen that there were rows
