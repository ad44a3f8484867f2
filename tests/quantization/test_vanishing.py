"""quantization/vanishing.py: tiny weights keep their values in stock transformers, or the linear is named. End to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_tensors
from conftest import Run
from small_runs import slow_but
from tiny_models import make_model
from transformers import AutoModelForCausalLM

SHRUNK = ("q_proj", "k_proj", "v_proj")
FLAGS = ("--samples", 4, "--sequence-length", 32)


def shrunk(folder: Path, size: float) -> Path:
    """A float32 llama whose attention inputs have weights of about `size`."""
    source = make_model(folder, "llama")

    def shrink(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if any(part in name for part in SHRUNK):
                tensor.mul_(size / tensor.std())

    edit_tensors(source, shrink)
    return source


def stock_weights(folder: Path) -> dict[str, torch.Tensor]:
    """By name, as transformers unpacks them at the first forward."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        network(torch.tensor([[3, 4, 5]]))
    return dict(network.state_dict())


@pytest.mark.parametrize("method", slow_but("gptq", "rtn", of=("rtn", "gptq", "apiq")))
@pytest.mark.parametrize("size", [1e-4, 1e-6])
def test_tiny_weights_are_rounded_as_finely_as_others(
    method: str, size: float, run: Run, text_file: Path, tmp_path: Path
) -> None:
    source = shrunk(tmp_path / "model", size)
    out = tmp_path / "out"
    flags = ("--bits", 4, "--group-size", 8, "--calibration", text_file, *FLAGS)
    code, _, error = run("quantize", method, source, out, *flags)
    assert code == 0, error
    before, after = stock_weights(source), stock_weights(out)
    for name in before:
        if "_proj" in name:
            lost = float((after[name].float() - before[name]).norm() / before[name].norm())
            assert lost < 0.2, name


@pytest.mark.parametrize("method", slow_but("gptq", of=("rtn", "gptq", "apiq")))
def test_a_linear_of_which_nothing_would_be_left_is_refused_by_name(
    method: str, run: Run, text_file: Path, tmp_path: Path
) -> None:
    source = shrunk(tmp_path / "model", 3e-9)
    flags = ("--bits", 4, "--group-size", 8, "--calibration", text_file, *FLAGS)
    code, _, error = run("quantize", method, source, tmp_path / "out", *flags)
    assert code == 1
    assert "model.layers.0.self_attn." in error and "all its weights would become 0" in error
    assert not (tmp_path / "out").exists()
    left_out = [flag for part in SHRUNK for flag in ("--ignore", part)]
    code, _, error = run("quantize", method, source, tmp_path / "out", *flags, *left_out, "--overwrite")
    assert code == 0, error


def test_in_bfloat16_any_size_has_a_scale(run: Run, text_file: Path, tmp_path: Path) -> None:
    source = shrunk(tmp_path / "model", 3e-9)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    flags = ("--bits", 4, "--group-size", 8, "--calibration", text_file, *FLAGS)
    assert run("quantize", "rtn", source, tmp_path / "out", *flags)[0] == 0
    before, after = stock_weights(source), stock_weights(tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert float((after[name].float() - before[name]).norm() / before[name].norm()) < 0.2
