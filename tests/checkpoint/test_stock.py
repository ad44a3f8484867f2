"""checkpoint/stock.py: transformers opens a folder of a stranger without fetching or choosing code. End to end."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import tokens
from tiny_models import make_adapter, make_model

from compresskit.checkpoint.stock import add_adapter, load_whole, stock_config
from compresskit.errors import CheckpointError

KERNELS: list[dict[str, Any]] = [
    {"attn_implementation": "who/what"},
    {"_attn_implementation": "kernels-community/flash-attn2"},
    {"attn_implementation": {"": "who/what"}},
    {"attn_implementation": "flash_attention_2"},
    {"_attn_implementation": "flex_attention"},
    {"experts_implementation": "sonicmoe"},
    {"_experts_implementation": "deepgemm"},
    {"use_kernels": True, "kernel_config": {"RMSNorm": "who/what:Norm"}},
    {"fusion_config": {"patch_embeddings": True}},
    {"transformers_weights": "other.safetensors"},
]
"""Keys with which config.json makes transformers fetch a kernel, or take another file than the one that is checked."""


def with_keys(folder: Path, keys: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


@pytest.mark.parametrize("keys", KERNELS, ids="-".join)
def test_a_network_has_the_usual_code_whatever_the_configuration_asks_for(keys: dict[str, Any], tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "qwen3_moe" if "experts" in str(keys) else "llama")
    usual = load_whole(folder, torch.float32)
    with_keys(folder, keys)
    network = load_whole(folder, torch.float32)
    for name in ("_attn_implementation", "_experts_implementation"):
        assert getattr(network.config, name) == getattr(usual.config, name)
    with torch.no_grad():
        assert torch.equal(network(tokens()).logits, usual(tokens()).logits)
    network.save_pretrained(tmp_path / "saved")
    assert not keys.keys() & json.loads((tmp_path / "saved" / "config.json").read_text()).keys()


def test_a_configuration_that_transformers_does_not_take_is_named_in_one_line(model: Path) -> None:
    with_keys(model, {"output_attentions": True, "_attn_implementation": "who/what"})
    with pytest.raises(CheckpointError) as caught:
        stock_config(model)
    assert str(caught.value).startswith(f"{model / 'config.json'}: ")
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_opened(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load_whole(model, torch.float32)


def test_an_adapter_beside_a_model_is_refused_instead_of_added_unseen(model: Path) -> None:
    (model / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        load_whole(model, torch.float32)


def test_an_adapter_s_configuration_imports_nothing(model: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", model)
    config = json.loads((folder / "adapter_config.json").read_text())
    foreign = {"megatron_config": {"a": 1}, "megatron_core": "who.what", "layer_replication": [[0, 1]], "use_qalora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config | foreign | {"no_such_key": 1}))
    network = load_whole(model, torch.float32)
    before = network(tokens()).logits
    add_adapter(network, folder)
    assert "who" not in sys.modules
    assert not torch.equal(network(tokens()).logits, before)
