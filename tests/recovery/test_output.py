"""recovery/output.py: adapters alone, merged or trained on, and full updates, in stock tools. End to end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from recovery_data import options
from stock_tools import tokens, walked_logits
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.reader import sha256
from compresskit.compensation.eora import EoRA
from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate
from compresskit.models.load import open_model, with_adapter
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Full, Random
from compresskit.stages import Options

pytest.importorskip("scipy")


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_full_update_changes_the_weights_of_the_blocks_alone(
    family: str, tiny: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    asked = options(tiny[family], data, steps=12, update="full", learning_rate=5e-3, loss="response")
    result = recover(Random(budget=0.5), str(tiny[family]), tmp_path / "out", asked)
    assert result["held_back_after"]["loss"] < result["held_back_before"]["loss"]
    before, after = (open_model(folder) for folder in (tiny[family], tmp_path / "out"))
    inside = f"{before.architecture.blocks}."
    for name in before.checkpoint.tensors:
        same = torch.equal(before.checkpoint.read(name), after.checkpoint.read(name))
        assert same == (inside not in f"{before.removed_prefix}{name}"), name
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(tokens()).logits, walked_logits(tmp_path / "out"), atol=1e-4)


def test_an_adapter_alone_is_one_that_peft_adds_to_the_source(
    tiny: dict[str, Path], damaged: Path, data: Path, tmp_path: Path
) -> None:
    from peft import PeftModel

    asked = options(tiny["llama"], data, steps=4, learning_rate=1e-2)
    for name, alone in (("adapter", True), ("merged", False)):
        recover(Random(budget=0.5), str(damaged), tmp_path / name, asked.model_copy(update={"adapter_only": alone}))
    base = AutoModelForCausalLM.from_pretrained(damaged, dtype=torch.float32)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by a name that 5.24 replaced
        found = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(tokens()).logits
    assert torch.allclose(found, walked_logits(tmp_path / "merged"), atol=1e-4)
    assert (tmp_path / "adapter" / "compresskit.json").is_file()


def test_the_adapter_of_a_low_bit_checkpoint_is_trained_on_from_where_it_was(
    tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path
) -> None:
    from compresskit.quantization.apiq.method import ApiQ
    from compresskit.quantization.run import quantize
    from compresskit.stages import Options

    low = tmp_path / "low"
    calibrated = Options(calibration=str(text_file), samples=4, sequence_length=64)
    quantize(ApiQ(bits=2, epochs=1, saliency="none"), str(tiny["llama"]), low, calibrated)
    asked = options(tiny["llama"], data, steps=12, loss="distill", learning_rate=2e-3)
    out = tmp_path / "out"
    recover(Random(budget=0.5), str(low), out, asked)
    assert json.loads((out / "recover.json").read_text())["data_weight"] == 0.5, "what was taken where nothing was given"
    assert sha256(out / "model.safetensors") == sha256(low / "model.safetensors")
    first, last = (with_adapter(open_model(folder), None).adapter for folder in (low, out))
    assert first is not None and last is not None and set(first.names) == set(last.names)
    name = first.names[0]
    assert 0 < float((first.update(name) - last.update(name)).norm()) < float(first.update(name).norm())
    assert first.rank(name) == last.rank(name)


def test_the_adapter_of_a_compensation_is_trained_on(tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"calibration": str(text_file), "samples": 4, "sequence_length": 64}
    quantize(RTN(bits=2, group_size=16), str(tiny["llama"]), tmp_path / "low", Options(**text))
    repair = CompensateOptions(original=str(tiny["llama"]), **text)
    compensate(EoRA(rank=4, adapter_bits=8), str(tmp_path / "low"), tmp_path / "repaired", repair)
    asked = options(tiny["llama"], data, loss="distill", epochs=4, learning_rate=1e-3)
    result = recover(Full(), str(tmp_path / "repaired"), tmp_path / "out", asked)
    assert result["held_back_after"]["loss"] < result["held_back_before"]["loss"] + 0.05
    found = with_adapter(open_model(tmp_path / "out"), None)
    assert found.adapter is not None and found.adapter.rank(found.linears[0]) == 4
    assert sha256(tmp_path / "out" / "model.safetensors") == sha256(tmp_path / "low" / "model.safetensors")
