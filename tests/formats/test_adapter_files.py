"""formats/adapter_files.py: the names of an adapter's tensors. Against names written by hand, as stock peft loads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.errors import CheckpointError
from compresskit.formats.adapter_files import saved_name

PLACE = "base_model.model.model.layers.0.self_attn.q_proj"
FILE = Path("adapter_model.safetensors")


@pytest.mark.parametrize(
    ("stored", "saved"),
    [
        ("lora_A.weight", "lora_A.weight"),
        ("lora_A.default.weight", "lora_A.weight"),
        ("lora_B.bias", "lora_B.bias"),
        ("lora_B.default.bias", "lora_B.bias"),
        ("lora_embedding_A", "lora_embedding_A"),
        ("lora_embedding_B.default", "lora_embedding_B"),
        ("lora_magnitude_vector", "lora_magnitude_vector"),
        ("lora_magnitude_vector.weight", "lora_magnitude_vector.weight"),
        ("lora_magnitude_vector.default.weight", "lora_magnitude_vector"),
        ("ia3_l.default", "ia3_l"),
        ("base_layer.weight", "base_layer.weight"),
    ],
)
def test_names_are_those_that_peft_saves(stored: str, saved: str) -> None:
    assert saved_name(FILE, f"{PLACE}.{stored}") == f"{PLACE}.{saved}"


@pytest.mark.parametrize(
    "name",
    [
        f"{PLACE}.lora_A.mine.weight",
        f"{PLACE}.lora_A.my.own.weight",
        f"{PLACE}.lora_embedding_A.mine",
        f"{PLACE}.lora_A.weight".removeprefix("base_model.model."),
        "base_model.layers.0.q_proj.lora_A.weight",
        "lora_A.weight",
    ],
)
def test_names_that_peft_passes_over_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match="peft loads no such key") as caught:
        saved_name(FILE, name)
    assert name in str(caught.value)
    assert str(FILE) in str(caught.value)
