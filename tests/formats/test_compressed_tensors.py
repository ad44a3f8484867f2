"""Packed files of other tools are read by the format's definition. Oracle: column by column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.formats.compressed_tensors import PackQuantized
from compresskit.numerics.scheme import Scheme


@pytest.mark.parametrize("symmetric", [True, False])
def test_columns_that_activation_order_has_grouped_are_unpacked(symmetric: bool, tmp_path: Path) -> None:
    """The tensor weight_g_idx says for every column which group's scale it has."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (48, 32), generator=generator).to(torch.int8)
    scale = torch.rand(48, 4, generator=generator) + 0.1
    zero_point = torch.randint(-4, 4, (48, 4), generator=generator).to(torch.int8)
    group_of = torch.arange(32)[torch.randperm(32, generator=generator)].div(8, rounding_mode="floor").int()
    tensors = {
        "a.weight_packed": pack_to_int32(codes, 4),
        "a.weight_scale": scale,
        "a.weight_shape": torch.tensor([48, 32]),
        "a.weight_g_idx": group_of,
    }
    if not symmetric:
        tensors["a.weight_zero_point"] = pack_to_int32(zero_point, 4, packed_dim=0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    group = Scheme(4, 8, symmetric)
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 8}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups, "dequantize": True}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    found = PackQuantized.of(open_checkpoint(tmp_path))
    assert found.scheme("a") == group
    zero = torch.zeros_like(scale) if symmetric else zero_point.float()
    columns = [(codes[:, j].float() - zero[:, group_of[j]]) * scale[:, group_of[j]] for j in range(32)]
    wanted = torch.stack(columns, dim=1)
    assert torch.equal(found.read("a"), wanted)
    assert "a.weight_g_idx" in found.stored_tensors("a")
