"""quantization/run.py: streams, keys, exit codes, stock tools, a collapse, an interruption. End to end."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from conftest import SMALL, Run
from safetensors.torch import load_file
from stock_tools import stock_logits, walked_logits
from tiny_models import make_model
from warm_processes import finish, interrupt

from compresskit.checkpoint.reader import sha256
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.rtn import RTN
from compresskit.stages import Options

STAGE_KEYS = {
    "stage", "method", "output", "source", "seconds", "peak_memory_bytes", "parameters_before", "parameters_after",
    "bytes_before", "bytes_after", "settings", "bits_per_weight", "kl_held_back",
}  # fmt: skip


@pytest.mark.parametrize("method", ["rtn", "gptq", "apiq", "nf4"])
def test_every_method_prints_one_json_object_with_the_documented_keys(
    method: str, run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text, err = run("quantize", method, tiny["llama"], out, "--calibration", text_file, *SMALL, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result.keys() >= STAGE_KEYS
    assert result["bytes_after"] < result["bytes_before"]
    assert result["parameters_after"] == result["parameters_before"]
    assert "on held-back text KL" in err
    code, text, _ = run("evaluate", out, "--against", tiny["llama"], "--data", text_file, "--windows", 2, "--sequence-length", 64, "--json")  # fmt: skip # noqa: E501
    assert code == 0
    assert 0 < json.loads(text)["kl"] < 0.1
    code, text, _ = run("inspect", out)
    assert code == 0
    assert "low_bit" in text


def test_a_collapsed_model_is_written_and_named_and_exits_3(run: Run, text_file: Path, tmp_path: Path) -> None:
    """A head and an embedding so large that 2 bits in between leave nothing of what the model says."""
    source = make_model(tmp_path / "loud", "llama", tie_word_embeddings=False)

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].mul_(60)

    edit_tensors(source, louder)
    out = tmp_path / "out"
    code, text, err = run("quantize", "rtn", source, out, "--bits", 2, "--calibration", text_file, *SMALL)
    assert (code, text) == (3, f"{out}\n"), err
    assert "The model has collapsed" in err
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--bits", "1"), "--bits"),
        (("--bits", "9"), "--bits"),
        (("--bits", "2.5", "--asymmetric"), "--bits 2.5"),
        (("--group-size", "24"), "--group-size 24"),
        (("--sparsity", "0.5"), "No such option: --sparsity"),
        (("--rank", "4"), "No such option: --rank of gptq; apiq has it"),
        (("--ignore", "model"), "leaves nothing"),
    ],
)
def test_unusable_settings_are_refused_with_one_line(
    arguments: tuple[str, ...],
    said: str,
    run: Run,
    tiny: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    command = ("quantize", "gptq", tiny["llama"], tmp_path / "out", "--calibration", text_file, *SMALL, *arguments)
    code, text, err = run(*command)
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_nan_activations_fail_with_the_block_named(run: Run, text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "bad", "llama")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    code, _, err = run("quantize", "gptq", source, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert code == 1
    assert "model.layers.1" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


def test_an_interrupted_run_resumes_to_the_same_bytes(text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "deep", "llama", num_hidden_layers=6, hidden_size=64, intermediate_size=256)
    options = ("--calibration", text_file, "--samples", 16, "--sequence-length", 128, "--bits", 3)
    command = ["quantize", "gptq", str(source), *map(str, options)]
    out, whole, log = (tmp_path / name for name in ("out", "whole", "log"))
    assert interrupt([*command, str(out)], out, log, signal.SIGINT) == 130, log.read_text()
    finish([*command, str(out), "--resume"], log)
    finish([*command, str(whole)], log)
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")


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


def test_the_embedding_of_a_32_bit_source_can_be_stored_in_16(
    tiny: dict[str, Path], make: Callable[..., dict[str, object]], tmp_path: Path
) -> None:
    whole = make(RTN(bits=4), tiny["llama"], tmp_path / "whole")
    half = make(RTN(bits=4, embedding_bits=16), tiny["llama"], tmp_path / "half")
    assert float(half["bytes_after"]) < 0.75 * float(whole["bytes_after"])  # type: ignore[arg-type]
    [stock] = stock_logits([tmp_path / "half"], tmp_path)
    assert (stock - walked_logits(tmp_path / "half")).abs().max() < 1e-3
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
