"""models/ragged.py: ragged checkpoints load by our own classes, not by the code in their folder. End to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from small_runs import prune
from stock_tools import tokens, walked_logits
from tiny_models import make_model
from transformers import AutoModelForCausalLM

from compresskit.evaluation.speed import speed
from compresskit.machine.device import Where
from compresskit.models.layouts import configuration
from compresskit.models.load import open_model
from compresskit.models.meta import build
from compresskit.models.ragged import load_stock
from compresskit.models.shapes import without_weights
from compresskit.pruning.cfsp import CFSP

CPU = torch.device("cpu")


def is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def make_ragged(folder: Path) -> Path:
    """The generated files and configuration of the ragged layout, at the widths that the weights have."""
    model = open_model(make_model(folder, "qwen2"))
    config, files = configuration(model, [[96], [96], [64]])
    for block in config["block_configs"]:
        block["ffn"]["intermediate_size"] = 96
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_a_ragged_checkpoint_runs_without_a_flag_and_without_the_code_in_its_folder(
    trust_remote_code: bool, tmp_path: Path
) -> None:
    folder = make_ragged(tmp_path / "ragged")
    for name in ("modeling_compresskit.py", "configuration_compresskit.py"):
        with (folder / name).open("a") as file:
            file.write("raise SystemExit('foreign code ran')\n")
    model = open_model(folder, trust_remote_code)
    where = Where(CPU, torch.float32, trust_remote_code)
    assert is_positive(speed(model, where, rounds=1).prefill_tokens_per_second)
    build(model, trust_remote_code)
    (folder / "model.safetensors").unlink()
    assert without_weights(folder, trust_remote_code).tensors.keys() == model.checkpoint.tensors.keys()


def test_a_ragged_checkpoint_s_map_of_classes_is_not_followed(tmp_path: Path) -> None:
    folder = make_ragged(tmp_path / "ragged")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = dict.fromkeys(config["auto_map"], "who/what--module.Class")
    (folder / "config.json").write_text(json.dumps(config))
    network = load_stock(open_model(folder, True), Where(CPU, torch.float32, True))
    assert type(network).__module__ == "compresskit_qwen2_ragged.modeling_compresskit"


def test_registered_classes_load_ragged_checkpoints_without_their_code(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    import compresskit

    prune(tiny["qwen2"], tmp_path / "out", text_file, CFSP(sparsity=0.3, allocation="global", round_to=4))
    compresskit.register()
    compresskit.register()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (stock(tokens()).logits - walked_logits(tmp_path / "out")).abs().max() < 1e-4
