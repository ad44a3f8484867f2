"""models/shape_checks.py: tensors that the configuration rules out are refused by name, on opening. End to end."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_damage import edit_config, edit_tensors

from compresskit.errors import CheckpointError
from compresskit.models.load import open_model


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "opt"])
def test_a_config_with_fewer_blocks_than_the_weights_is_refused(family: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny[family], tmp_path / "model"))
    key = open_model(folder).architecture.count_key
    edit_config(folder, **{key: 2})
    with pytest.raises(CheckpointError, match=rf"config\.json: {key} is 2, the weights hold .*\.2\.") as caught:
        open_model(folder)
    assert caught.value.exit_code == 2


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
