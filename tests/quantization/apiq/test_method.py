"""quantization/apiq/method.py: training helps and can be repeated, and stock peft loads the adapter. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_runs import options, slow_but
from stock_tools import stock_logits, walked_logits
from tiny_models import PACKED

from compresskit.errors import RequestError
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.models.architectures import ARCHITECTURES
from compresskit.quantization.apiq.method import ApiQ
from compresskit.quantization.run import quantize


@pytest.mark.parametrize("bits", slow_but(2, of=(2, 3)))
def test_the_loss_falls_in_every_block_and_the_result_beats_its_start(
    bits: int, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    kls = {}
    for epochs in (0, 12):
        out = tmp_path / str(epochs)
        quantize(ApiQ(bits=bits, group_size=16, rank=0, epochs=epochs), str(tiny["llama"]), out, options(text_file))
        report = evaluate(
            str(out), EvaluateOptions(against=str(tiny["llama"]), data=str(text_file), windows=8, sequence_length=64)
        )
        kls[epochs] = report["kl"]
    facts = json.loads((tmp_path / "12" / "compresskit.json").read_text())["facts"]["blocks"]
    assert all(block["trained_error"] < block["start_error"] for block in facts)
    assert bits > 2 or kls[12] < kls[0]  # at 3 bits a random model's KL is all noise


@pytest.mark.parametrize("family", slow_but("llama", "mixtral", of=PACKED))
def test_every_familys_result_and_adapter_load_with_stock_tools(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    experts = bool(ARCHITECTURES[family].experts)
    method = ApiQ(bits=2, group_size=16, epochs=1, rank=0 if experts else 3, symmetric=experts)
    quantize(method, str(tiny[family]), tmp_path / family, options(text_file))
    [found] = stock_logits([tmp_path / family], tmp_path)
    assert (found - walked_logits(tmp_path / family)).abs().max() < 1e-3


def test_the_adapter_finds_its_base_from_another_folder(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(ApiQ(bits=2, group_size=16, epochs=0, rank=2), str(tiny["llama"]), Path("out"), options(text_file))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((tmp_path / "out").resolve())


def test_the_adapter_counts_as_stored_bits(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    method = ApiQ(bits=2, group_size=16, epochs=0, rank=4)
    result = quantize(method, str(tiny["llama"]), tmp_path / "out", options(text_file))
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    dense = load_file(tiny["llama"] / "model.safetensors")
    packed = load_file(tmp_path / "out" / "model.safetensors")
    stored = [t for name, t in packed.items() if name not in dense] + list(adapter.values())
    weights = sum(t.numel() for name, t in dense.items() if name not in packed)
    assert abs(8 * sum(t.numel() * t.element_size() for t in stored) / weights - result["bits_per_weight"]) < 1e-9
    without = evaluate(str(tmp_path / "out"), EvaluateOptions(data=str(text_file), windows=2, sequence_length=64, adapter="none"))
    with_it = evaluate(str(tmp_path / "out"), EvaluateOptions(data=str(text_file), windows=2, sequence_length=64))
    assert without["perplexity"] != with_it["perplexity"]
    assert with_it["bytes"] - without["bytes"] == (tmp_path / "out" / "adapter" / "adapter_model.safetensors").stat().st_size


def test_an_adapter_in_eight_bits_takes_half_the_bytes_and_loads_with_stock_tools(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    for bits in (16, 8):
        method = ApiQ(bits=2, group_size=16, epochs=1, rank=4, adapter_bits=bits)
        quantize(method, str(tiny["llama"]), tmp_path / str(bits), options(text_file))
    large, small = (load_file(tmp_path / str(bits) / "adapter" / "adapter_model.safetensors") for bits in (16, 8))
    assert {tensor.dtype for tensor in small.values()} == {torch.float8_e4m3fn}
    assert 2 * sum(t.nbytes for t in small.values()) == sum(t.nbytes for t in large.values())
    (found,) = stock_logits([tmp_path / "8"], tmp_path)
    assert (found - walked_logits(tmp_path / "8")).abs().max() < 1e-3


@pytest.mark.parametrize("saliency", slow_but("none", of=("fisher", "none")))
@pytest.mark.parametrize("start", ["gptq", "rtn"])
def test_every_variant_runs_and_is_reproducible(
    saliency: str, start: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    settings = {"saliency": saliency, "start": start, "regularize": "after-lora", "rounding": "nearest"}
    method = ApiQ(bits=3, rank=2, epochs=2, batch=4, **settings)  # type: ignore[arg-type]
    for name in ("a", "b"):
        quantize(method, str(tiny["qwen3"]), tmp_path / name, options(text_file))
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert not list(tmp_path.glob(".*scratch*"))


def test_a_rank_above_the_smallest_side_is_refused(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="--rank 40"):
        quantize(ApiQ(bits=3, rank=40), str(tiny["llama"]), tmp_path / "out", options(text_file))
