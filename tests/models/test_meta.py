"""models/meta.py: every stored tensor has a plain name and comes back bit by bit, in every family. Property test.

No key of config.json decides which code a network is built from.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES

from compresskit.models.load import open_model
from compresskit.models.meta import build, read_plain, to_stored


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stored_tensor_has_a_plain_name_and_comes_back_bit_equal(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    names = [name for name, _ in build(model).named_parameters() if model.has(name)]
    assert {model.stored_name(name) for name in names} == set(model.checkpoint.tensors)
    stored = load_file(tiny[family] / "model.safetensors")
    for name in names:
        assert torch.equal(to_stored(model, name, read_plain(model, name)), stored[model.stored_name(name)])


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["who/what", "kernels-community/flash-attn2", "flash_attention_2", {"": "who/what"}])
def test_a_network_is_built_without_the_kernels_that_a_configuration_names(key: str, value: object, model: Path) -> None:
    usual = build(open_model(model)).config
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {key: value, "experts_implementation": "sonicmoe"}))
    found = build(open_model(model)).config
    assert found._attn_implementation == usual._attn_implementation
    assert found._experts_implementation == usual._experts_implementation
