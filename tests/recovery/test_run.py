"""recovery/run.py: what is learned, what loads it, the same bytes each time. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recovery_data import options
from stock_tools import tokens, walked_logits
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.reader import sha256
from compresskit.recovery.method import SelectionMethod
from compresskit.recovery.run import recover
from compresskit.recovery.selection.paser import Paser
from compresskit.recovery.selection.random import Full, Random

pytest.importorskip("scipy")


def test_the_merged_checkpoint_loads_in_stock_tools_and_has_lost_less(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    asked = options(tiny["llama"], data, loss="distill", data_weight=0.0, epochs=4, self_samples=2, learning_rate=5e-3)
    result = recover(Paser(budget=0.5), str(damaged), out, asked)
    assert result["selected"] == 18
    assert set(result["time_shares"]) == {"selection", "held_back", "sampling", "teacher", "training"}
    assert 0 < sum(result["time_shares"].values()) < result["seconds"] + 0.1
    report = json.loads((out / "recover.json").read_text())
    assert report["held_back_after"]["by_cluster"].keys() == report["held_back_before"]["by_cluster"].keys() != set()
    assert report["losses"][-1] < 0.7 * report["losses"][0]
    assert (report["data_weight"], report["learning_rate"]) == (0.0, 5e-3)
    assert len(report["losses"]) == report["steps"] == 20
    assert len((out / "selection.jsonl").read_text().splitlines()) == 18
    assert result["parameters_after"] == result["parameters_before"]
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(tokens()).logits, walked_logits(out), atol=1e-4)
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("method", [Random(budget=0.5), Full()])
def test_the_responses_of_the_data_are_learned(
    method: SelectionMethod, tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    result = recover(method, str(damaged), tmp_path / "out", options(tiny["llama"], data, steps=20, learning_rate=2e-2))
    assert result["held_back_after"]["loss"] < result["held_back_before"]["loss"]


def test_the_same_command_gives_the_same_bytes(tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        recover(Random(budget=0.5), str(damaged), tmp_path / name, options(tiny["llama"], data, steps=3))
    assert sha256(tmp_path / "a" / "model.safetensors") == sha256(tmp_path / "b" / "model.safetensors")
