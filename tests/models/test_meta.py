"""models/meta.py: every stored tensor has a plain name and comes back bit by bit, in every family. Property test."""

from __future__ import annotations

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
