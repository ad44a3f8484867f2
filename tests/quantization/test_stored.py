"""Quantised checkpoints load with stock transformers and give the logits of the model that was in memory. End to end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import stock_logits, walked_logits
from tiny_models import FAMILIES, make_model

from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.models.architectures import ARCHITECTURES
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.method import GridMethod, QuantizeMethod
from compresskit.quantization.nf4 import NF4
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.report.inspect import inspect
from compresskit.stages import Options

PACKED = tuple(family for family in FAMILIES if not ARCHITECTURES[family].transposed)


@pytest.fixture(scope="module")
def make(text_file: Path) -> Callable[[QuantizeMethod, Path, Path], dict[str, object]]:
    def run(method: QuantizeMethod, source: Path, out: Path) -> dict[str, object]:
        return quantize(method, str(source), out, Options(calibration=str(text_file), samples=4, sequence_length=64))

    return run


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_packed_results_of_every_family_load_with_stock_tools(
    symmetric: bool, tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    families = [family for family in PACKED if symmetric or not ARCHITECTURES[family].experts]
    methods: list[GridMethod] = [
        RTN(bits=3, symmetric=symmetric, group_size=16),
        GPTQ(bits=2, symmetric=symmetric, group_size=0),
    ]
    folders = []
    for family in families:
        mixed = [GPTQ(bits=2.5, group_size=16)] if symmetric and not ARCHITECTURES[family].experts else []
        for method in methods + mixed:
            folders.append(tmp_path / f"{family}-{type(method).__name__}-{method.bits}")
            make(method, tiny[family], folders[-1])
    for folder, found in zip(folders, stock_logits(folders, tmp_path), strict=True):
        assert (found - walked_logits(folder)).abs().max() < 1e-3, folder.name


def test_nf4_results_load_with_stock_tools(tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    folders = []
    for family in [family for family in FAMILIES if not ARCHITECTURES[family].experts]:
        for nested in (True, False):
            folders.append(tmp_path / f"{family}-{nested}")
            make(NF4(nested=nested), tiny[family], folders[-1])
    for folder, found in zip(folders, stock_logits(folders, tmp_path), strict=True):
        assert (found - walked_logits(folder)).abs().max() < 1e-3, folder.name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_files_have_the_stated_bits_a_weight(
    bits: int, tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    result = make(RTN(bits=bits, group_size=32), tiny["llama"], tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    dense = load_file(tiny["llama"] / "model.safetensors")
    stored = sum(t.numel() * t.element_size() for name, t in found.items() if name not in dense)
    weights = sum(t.numel() for name, t in dense.items() if name not in found)
    assert abs(8 * stored / weights / float(result["bits_per_weight"]) - 1) < 1e-9  # type: ignore[arg-type]
    assert inspect(str(tmp_path / "out"))["low_bit"]["bits"] == {str(bits): 21}
    assert inspect(str(tmp_path / "out"))["parameters"] == sum(t.numel() for t in dense.values())


def test_a_ragged_model_stays_ragged(
    tiny: dict[str, Path], text_file: Path, make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    options = Options(calibration=str(text_file), samples=4, sequence_length=64)
    prune(CFSP(sparsity=0.4, round_to=8), str(tiny["llama"]), tmp_path / "pruned", options)
    result = make(GPTQ(bits=4), tmp_path / "pruned", tmp_path / "out")
    assert result["settings"]["group_size"] in (8, 16, 32)  # type: ignore[index]
    found = stock_logits([tmp_path / "out"], tmp_path)[0]
    assert (found - walked_logits(tmp_path / "out")).abs().max() < 1e-3
    chain = json.loads((tmp_path / "out" / "compresskit.json").read_text())
    assert [chain["method"], chain["source"]["method"]] == ["gptq", "cfsp"]


def test_ignored_linears_stay_bit_equal_and_are_reported(
    tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    result = make(RTN(bits=4, ignore=("down", "layers.0.")), tiny["llama"], tmp_path / "out")
    dense, found = (load_file(folder / "model.safetensors") for folder in (tiny["llama"], tmp_path / "out"))
    kept = [name for name in dense if name in found and "proj" in name]
    assert sorted(name.removesuffix(".weight") for name in kept) == sorted(result["dense_linears"])  # type: ignore[call-overload]
    assert len(kept) == 7 + 2
    assert all(torch.equal(dense[name], found[name]) for name in kept)
    logits = stock_logits([tmp_path / "out"], tmp_path)[0]
    assert (logits - walked_logits(tmp_path / "out")).abs().max() < 1e-3


def test_bfloat16_checkpoints_get_bfloat16_scales(make: Callable[..., dict[str, object]], tmp_path: Path) -> None:
    source = make_model(tmp_path / "half", "qwen2", dtype=torch.bfloat16)
    make(GPTQ(bits=4), source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for name, t in found.items() if name.endswith("weight_scale")} == {torch.bfloat16}
    logits = stock_logits([tmp_path / "out"], tmp_path)[0]
    assert (logits - walked_logits(tmp_path / "out")).abs().max() < 1e-3


def test_the_same_request_twice_gives_the_same_bytes(
    tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    for name in ("a", "b"):
        make(GPTQ(bits=3), tiny["qwen3"], tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


def test_what_cannot_be_stored_is_refused_before_any_work(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    options = Options(calibration=str(text_file), samples=4, sequence_length=64)
    out = tmp_path / "out"
    cases: list[tuple[QuantizeMethod, str, type[Exception], str]] = [
        (RTN(bits=3.5, symmetric=False), "llama", RequestError, "--bits 3.5"),
        (RTN(bits=3, group_size=64), "llama", RequestError, "group-size 64: model.layers.0.self_attn.q_proj has 32"),
        (RTN(bits=3, ignore=("layers",)), "llama", RequestError, "leaves nothing"),
        (GPTQ(bits=3), "gpt2", UnsupportedArchitecture, "nf4"),
        (GPTQ(bits=2.5), "mixtral", UnsupportedArchitecture, "whole --bits"),
        (GPTQ(bits=3, symmetric=False), "mixtral", UnsupportedArchitecture, "--symmetric"),
    ]
    for method, family, kind, said in cases:
        with pytest.raises(kind, match=said.replace(".", r"\.")):
            quantize(method, str(tiny[family]), out, options)
    quantize(RTN(bits=4), str(tiny["llama"]), out, options)
    with pytest.raises(RequestError, match="quantized already"):
        quantize(RTN(bits=4), str(out), tmp_path / "again", options)
    assert not (tmp_path / "again").exists()


def test_the_embedding_of_a_32_bit_source_can_be_stored_in_16(
    tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    whole = make(RTN(bits=4), tiny["llama"], tmp_path / "whole")
    half = make(RTN(bits=4, embedding_bits=16), tiny["llama"], tmp_path / "half")
    assert float(half["bytes_after"]) < 0.75 * float(whole["bytes_after"])  # type: ignore[arg-type]
    [stock] = stock_logits([tmp_path / "half"], tmp_path)
    assert (stock - walked_logits(tmp_path / "half")).abs().max() < 1e-3
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
