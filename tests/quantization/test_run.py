"""`compresskit quantize` from the command line: streams, keys, exit codes, a collapse, an interruption. End to end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from tiny_models import make_model

from compresskit.checkpoint.folder import partial_folder
from compresskit.checkpoint.reader import sha256
from compresskit.cli.main import main

SMALL = ("--samples", "8", "--sequence-length", "64")
STAGE_KEYS = {
    "stage", "method", "output", "source", "seconds", "peak_memory_bytes", "parameters_before", "parameters_after",
    "bytes_before", "bytes_after", "settings", "bits_per_weight", "kl_held_back",
}  # fmt: skip


def hear_interrupts() -> None:
    """A test run in the background passes on an ignored SIGINT, which its children would ignore too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()  # what making the tiny models printed
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return int(caught.value.code or 0), output.out, output.err


@pytest.mark.parametrize("method", ["rtn", "gptq", "apiq", "nf4"])
def test_every_method_prints_one_json_object_with_the_documented_keys(
    method: str, capsys: pytest.CaptureFixture[str], tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, text, err = run(capsys, "quantize", method, tiny["llama"], out, "--calibration", text_file, *SMALL, "--json")
    assert code == 0, err
    result = json.loads(text)
    assert result.keys() >= STAGE_KEYS
    assert result["bytes_after"] < result["bytes_before"]
    assert result["parameters_after"] == result["parameters_before"]
    assert "on held-back text KL" in err
    code, text, _ = run(capsys, "evaluate", out, "--against", tiny["llama"], "--data", text_file, "--windows", 2, "--sequence-length", 64, "--json")  # fmt: skip # noqa: E501
    assert code == 0
    assert 0 < json.loads(text)["kl"] < 0.1
    code, text, _ = run(capsys, "inspect", out)
    assert code == 0
    assert "low_bit" in text


def test_a_collapsed_model_is_written_and_named_and_exits_3(
    capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path
) -> None:
    """A head and an embedding so large that 2 bits in between leave nothing of what the model says."""
    source = make_model(tmp_path / "loud", "llama", tie_word_embeddings=False)

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"].mul_(60)

    edit_tensors(source, louder)
    out = tmp_path / "out"
    code, text, err = run(capsys, "quantize", "rtn", source, out, "--bits", 2, "--calibration", text_file, *SMALL)
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
        (("--ignore", "model"), "leaves nothing"),
    ],
)
def test_unusable_settings_are_refused_with_one_line(
    arguments: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tiny: dict[str, Path],
    text_file: Path,
    tmp_path: Path,
) -> None:
    command = ("quantize", "gptq", tiny["llama"], tmp_path / "out", "--calibration", text_file, *SMALL, *arguments)
    code, text, err = run(capsys, *command)
    assert (code, text, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert list(tmp_path.iterdir()) == []


def test_nan_activations_fail_with_the_block_named(capsys: pytest.CaptureFixture[str], text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "bad", "llama")
    edit_tensors(source, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].fill_(3e38))
    code, _, err = run(capsys, "quantize", "gptq", source, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert code == 1
    assert "model.layers.1" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad"]


@pytest.mark.parametrize("method", ["gptq", "apiq"])
def test_an_interrupted_run_resumes_to_the_same_bytes(method: str, text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "deep", "llama", num_hidden_layers=16, hidden_size=64, intermediate_size=256)
    options = ("--calibration", text_file, "--samples", "16", "--sequence-length", "128", "--bits", "3")
    options = (*options, "--epochs", "1", "--rank", "2", "--adapter-bits", "8") if method == "apiq" else options
    command = [sys.executable, "-m", "compresskit", "quantize", method, str(source)]
    arguments = list(map(str, options))
    first = [*command, str(tmp_path / "out"), *arguments]
    with subprocess.Popen(first, stderr=subprocess.PIPE, preexec_fn=hear_interrupts) as process:  # noqa: PLW1509
        progress = partial_folder(tmp_path / "out") / "progress.json"
        while process.poll() is None and not (progress.exists() and len(json.loads(progress.read_text())["blocks"]) >= 2):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert not (tmp_path / "out").exists()
    for name, more in (("out", ["--resume"]), ("whole", [])):
        finished = subprocess.run([*command, str(tmp_path / name), *arguments, *more], capture_output=True, check=False)
        assert finished.returncode == 0, finished.stderr
    files = ["model.safetensors"] + (["adapter/adapter_model.safetensors"] if method == "apiq" else [])
    for file in files:
        assert sha256(tmp_path / "out" / file) == sha256(tmp_path / "whole" / file)
