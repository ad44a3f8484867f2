"""pruning/run.py: the same bytes each time and after an interruption, faults that leave nothing behind. End to end."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from conftest import SMALL, Run
from safetensors.torch import load_file
from small_runs import prune
from tiny_models import FAMILIES, make_model
from warm_processes import finish, interrupt

from compresskit.checkpoint.reader import sha256
from compresskit.pruning.cfsp import CFSP


def test_the_same_command_twice_gives_the_same_bytes(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert (
            run("prune", "cfsp", model, tmp_path / name, "--calibration", text_file, *SMALL, "--max-shard-size", "60KB")[0] == 0
        )
    files = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    assert len(files) > 1
    assert all(sha256(tmp_path / "a" / name) == sha256(tmp_path / "b" / name) for name in files)


def quantized(folder: Path) -> None:
    weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}}
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "config_groups": groups})


def test_unusable_places_are_refused_with_one_line(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    latin, empty, other = tmp_path / "latin.txt", tmp_path / "empty.txt", tmp_path / "other.jsonl"
    latin.write_bytes("caf\xe9 ".encode("latin-1") * 999)
    empty.touch()
    other.write_text('{"body": "words"}\n' * 999)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    taken = tmp_path / "taken"
    taken.mkdir()
    for source, out, text, said in [
        (tmp_path / "missing", "out", text_file, "no such folder"),
        (model, "taken", text_file, "exists already"),
        (model, "model/inside", text_file, "inside the source"),
        (model, "out", latin, "latin.txt"),
        (model, "out", empty, "empty.txt"),
        (model, "out", other, "body"),
        (model, "out", short, "short.txt"),
        ("demo:gpt5", "out", text_file, "demo:smollm2-135m"),
    ]:
        code, stdout, err = run("prune", "cfsp", source, tmp_path / out, "--calibration", text, *SMALL)
        assert (code, stdout, err.count("\n")) == (2, "", 1), err
        assert said in err
        assert not (tmp_path / "out").exists()
    quantized(model)
    code, _, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert code == 2
    assert "quantized already" in err


def test_nan_weights_fail_with_the_tensor_named_and_leave_nothing(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    edit_tensors(model, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    code, out, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert (code, out) == (1, "")
    assert name in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_nan_activations_fail_with_the_block_named(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    code, _, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert code == 1
    assert "model.layers.1" in err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def whole(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """(a command without its output, the output of a run of it that nothing stopped)."""
    root = tmp_path_factory.mktemp("whole")
    source = make_model(root / "deep", "llama", num_hidden_layers=8, hidden_size=64, intermediate_size=512)
    options = ("--calibration", text_file, "--samples", 32, "--sequence-length", 128, "--round-to", 8, "--sparsity", 0.5)
    command = ["prune", "cfsp", str(source), *map(str, options)]
    finish([*command, str(root / "out")], root / "log")
    return command, root / "out"


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_nothing_final_and_resumes_to_the_same_bytes(
    stop: signal.Signals, whole: tuple[list[str], Path], tmp_path: Path
) -> None:
    command, finished = whole
    out, log = tmp_path / "out", tmp_path / "log"
    code = interrupt([*command, str(out)], out, log, stop)
    if stop != signal.SIGKILL:
        assert code == 130, log.read_text()
        assert "--resume" in log.read_text()
    finish([*command, str(out), "--resume"], log)
    assert sha256(out / "model.safetensors") == sha256(finished / "model.safetensors")
    first, second = (json.loads((folder / "compresskit.json").read_text())["facts"] for folder in (out, finished))
    assert first == second


def test_bfloat16_checkpoints_stay_bfloat16(run: Run, text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "half", "qwen3", dtype=torch.bfloat16)
    assert run("prune", "cfsp", source, tmp_path / "out", "--calibration", text_file, *SMALL)[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_zero_returns_the_same_weights(family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    prune(tiny[family], tmp_path / "out", text_file, CFSP(sparsity=0))
    before, after = load_file(tiny[family] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
