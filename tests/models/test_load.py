"""models/load.py: names without the outer module's are read, and shapes that the configuration rules out are refused. Oracle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors
from tiny_models import VOCABULARY
from transformers import AutoModelForCausalLM

from compresskit.errors import CheckpointError
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk.walk import Walk


@pytest.mark.parametrize(("family", "prefix"), [("gpt2", "transformer."), ("opt", "model.")])
def test_files_of_the_hub_that_leave_out_the_outer_name_are_read(
    family: str, prefix: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny[family], tmp_path / "model"))

    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(prefix)] = tensors.pop(name)

    edit_tensors(folder, shorten)
    tokens = torch.randint(3, VOCABULARY, (2, 20))
    walk = Walk(open_model(folder), tokens, Where(torch.device("cpu"), torch.float32))
    for _ in walk:
        pass
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tiny[family], dtype=torch.float32).eval()(tokens).logits
    assert (torch.cat([logits for _, _, logits in walk.logits()]) - expected).abs().max() < 1e-4


def test_a_config_without_n_inner_means_four_times_the_hidden_size(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["gpt2"], tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    del config["n_inner"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match=r"expected \[32, 128\]"):
        open_model(folder)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_a_config_with_fewer_blocks_than_the_weights_is_refused(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny[family], tmp_path / "model"))
    key = open_model(folder).architecture.count_key
    edit_config(folder, **{key: 2})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is 2, the weights hold .*\.2\.") as caught:
        open_model(folder)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [10**12, True, "4", 0, -1, 3.0, None, [3]])
def test_a_number_of_blocks_that_is_none_is_refused(value: object, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["llama"], tmp_path / "model"))
    edit_config(folder, num_hidden_layers=value)
    with pytest.raises(CheckpointError, match=r"num_hidden_layers is .*, expected a whole number from 1 to"):
        open_model(folder)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "model.norm.weight"), ("llama", "model.layers.1.input_layernorm.weight"), ("llama", "lm_head.weight"),
        ("llama", "model.layers.0.mlp.down_proj.weight"), ("llama", "model.embed_tokens.weight"),
        ("gpt2", "transformer.h.0.attn.c_attn.bias"), ("opt", "model.decoder.layers.1.fc1.bias"),
        ("phi", "model.layers.0.input_layernorm.bias"),
    ],
)  # fmt: skip
def test_weights_stored_as_whole_numbers_are_refused(family: str, name: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny[family], tmp_path / "model"))
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int32)}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} is I32, expected floating point"):
        open_model(folder)


def test_a_mask_that_is_named_bias_may_hold_whole_numbers(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny["gpt2"], tmp_path / "model"))
    masks = {f"transformer.h.{block}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8) for block in range(3)}
    edit_tensors(folder, lambda tensors: tensors.update(masks))
    assert open_model(folder).block_count == 3
