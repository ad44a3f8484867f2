"""formats/gptq.py: GPTQ and AWQ files are read by their layouts' definition. Oracle: codes packed one bit at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.errors import CheckpointError
from compresskit.formats import open_format

OUT, IN, GROUP = 64, 32, 16


def packed_down(codes: list[list[int]], bits: int) -> torch.Tensor:
    """Rows of codes (n, columns) as a bit stream down each column, 32 bits a word."""
    columns = []
    for column in zip(*codes, strict=True):
        number = sum(code << (bits * place) for place, code in enumerate(column))
        words = [(number >> (32 * word)) & 0xFFFFFFFF for word in range(len(column) * bits // 32)]
        columns.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).T.contiguous()


def write(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_files_are_unpacked(bits: int, layout: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (IN, OUT), generator=generator)
    zero_point = torch.randint(1, 2**bits, (IN // GROUP, OUT), generator=generator)
    scales = torch.rand(IN // GROUP, OUT, generator=generator)
    group_of = torch.arange(IN)[torch.randperm(IN, generator=generator)] // GROUP
    stored = zero_point - int(layout == "gptq")
    tensors = {
        "a.qweight": packed_down(codes.tolist(), bits),
        "a.qzeros": packed_down(stored.T.tolist(), bits).T,
        "a.scales": scales,
        "a.g_idx": group_of.int(),
    }
    write(tmp_path, {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "checkpoint_format": layout}, tensors)
    found = open_format(open_checkpoint(tmp_path))
    assert found is not None and found.holds("a") and found.shape("a") == (OUT, IN) and found.bits("a") == bits
    rows = [(codes[i] - zero_point[group_of[i]]) * scales[group_of[i]] for i in range(IN)]
    assert torch.allclose(found.read("a"), torch.stack(rows, dim=1))


def test_awq_files_are_unpacked(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (IN, OUT), generator=generator)
    zero_point = torch.randint(16, (IN // GROUP, OUT), generator=generator)
    scales = torch.rand(IN // GROUP, OUT, generator=generator)

    def words(values: torch.Tensor) -> torch.Tensor:
        found = []
        for row in values.tolist():
            parts = [row[start : start + 8] for start in range(0, len(row), 8)]
            numbers = [sum(part[o] << (4 * place) for place, o in enumerate((0, 2, 4, 6, 1, 3, 5, 7))) for part in parts]
            found.append([number - (1 << 32) if number >= 1 << 31 else number for number in numbers])
        return torch.tensor(found, dtype=torch.int32)

    tensors = {"a.qweight": words(codes), "a.qzeros": words(zero_point), "a.scales": scales}
    write(tmp_path, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, tensors)
    found = open_format(open_checkpoint(tmp_path))
    assert found is not None and found.shape("a") == (OUT, IN)
    rows = [(codes[i] - zero_point[i // GROUP]) * scales[i // GROUP] for i in range(IN)]
    assert torch.allclose(found.read("a"), torch.stack(rows, dim=1))


@pytest.mark.parametrize("config", [{"quant_method": "gptq", "bits": 5}, {"quant_method": "awq", "bits": 4, "version": "gemv"}])
def test_unknown_layouts_are_named(config: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path, config, {"a.qweight": torch.zeros(1, 1, dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="not known"):
        open_format(open_checkpoint(tmp_path))
