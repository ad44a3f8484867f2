"""formats/mxfp4.py: packed experts are read as stock transformers dequantises them, bit for bit. Oracle on random bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from compresskit.errors import CheckpointError, NumericalError
from compresskit.formats.mxfp4 import dequantized
from compresskit.formats.stored_forms import open_dense

NAME = "model.layers.0.mlp.experts.gate_up_proj"


def packed(seed: int, *shape: int, largest: int = 255) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes and exponents, up to `largest` - 1."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(largest, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_experts_are_dequantised_to_the_same_bits_as_by_transformers(dtype: torch.dtype) -> None:
    blocks, scales = packed(0, 3, 40, 5)
    found, expected = dequantized(blocks, scales, dtype), convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    assert found.shape == expected.shape == (3, 160, 40)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_s_experts_are_dense_tensors(tmp_path: Path) -> None:
    blocks, scales = packed(1, 2, 12, 3, largest=200)
    bias = torch.randn(2, 12).bfloat16()
    found = open_dense(write(tmp_path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales, f"{NAME}_bias": bias}))
    assert {name: (spec.dtype, spec.shape) for name, spec in found.tensors.items()} == {
        f"{NAME}_bias": ("BF16", (2, 12)),
        NAME: ("BF16", (2, 96, 12)),
    }
    assert "quantization_config" not in found.config and found.stored_as == "MXFP4, read as BF16"
    assert found.stored_bytes == 2 * 12 * (2 + 3 * 17)
    assert torch.equal(found.read(NAME), convert_moe_packed_tensors(blocks, scales))
    assert torch.equal(found.read(f"{NAME}_bias"), bias)


def test_an_exponent_beyond_all_numbers_is_named(tmp_path: Path) -> None:
    blocks, scales = packed(2, 1, 4, 2)
    scales[0, 1, 1] = 255
    folder = write(tmp_path, {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales})
    with pytest.raises(NumericalError, match=f"{NAME} holds NaN or infinity"):
        open_dense(folder).read(NAME)


@pytest.mark.parametrize("damage", ["no scales", "scales of another shape", "blocks of another size", "both forms"])
def test_codes_and_exponents_that_do_not_fit_are_refused(damage: str, tmp_path: Path) -> None:
    blocks, scales = packed(3, 2, 4, 2)
    tensors = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
    tensors |= {
        "no scales": {f"{NAME}_scales_of_others": tensors.pop(f"{NAME}_scales")} if damage == "no scales" else {},
        "scales of another shape": {f"{NAME}_scales": scales[:, :2].contiguous()},
        "blocks of another size": {f"{NAME}_blocks": blocks[..., :8].contiguous()},
        "both forms": {NAME: torch.zeros(2, 64, 4)},
    }[damage]
    with pytest.raises(CheckpointError, match=NAME) as caught:
        open_dense(write(tmp_path, tensors))
    assert "\n" not in str(caught.value)
