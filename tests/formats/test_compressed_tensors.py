"""formats/compressed_tensors.py: codes and columns by the format's definition (oracle); stock tools load it (end to end)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import options, slow_but
from stock_tools import stock_logits, walked_logits
from tiny_models import PACKED

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.formats.compressed_tensors import PackQuantized, as_read, stored_linear, tensor_specs
from compresskit.models.architectures import ARCHITECTURES
from compresskit.numerics.grid import Grid
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.method import GridMethod
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.report.inspect import inspect

SCALES = {torch.float16: "F16", torch.bfloat16: "BF16"}
schemes = st.builds(Scheme, st.integers(2, 8), st.sampled_from([0, 4, 8, 16]), st.booleans())


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


@given(schemes, st.integers(0, 999), st.integers(1, 40), st.sampled_from([16, 48]), st.sampled_from(list(SCALES)))
def test_files_hold_the_codes_bit_for_bit(scheme: Scheme, seed: int, rows: int, columns: int, dtype: torch.dtype) -> None:
    """Unpacked by reading the bits of the words one by one."""
    generator = torch.Generator().manual_seed(seed)
    groups = scheme.groups(columns)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (rows, columns), generator=generator).float()
    zero = torch.randint(scheme.lowest, scheme.highest + 1, (rows, groups), generator=generator).float()
    zero = torch.zeros_like(zero) if scheme.symmetric else zero
    grid = Grid(torch.rand(rows, groups, generator=generator).add(0.1).to(dtype).float(), zero)
    tensors, weight = stored_linear(codes, grid, scheme, dtype)
    assert {spec.name: spec.shape for spec in tensor_specs("x", (rows, columns), scheme, SCALES[dtype])} == {
        f"x.{leaf}": tuple(tensor.shape) for leaf, tensor in tensors.items()
    }
    assert bits_of(tensors["weight_packed"], scheme, columns) == codes.int().tolist()
    if not scheme.symmetric:
        assert bits_of(tensors["weight_zero_point"].T, scheme, rows) == zero.T.int().tolist()
    exact = (codes - zero.repeat_interleave(columns // groups, 1)).to(dtype) * grid.scale.to(dtype).repeat_interleave(
        columns // groups, 1
    )
    assert torch.equal(weight, exact.float())
    for unpacked in (dtype, torch.float32):
        assert torch.equal(as_read(tensors, scheme, unpacked).float(), stored_linear(codes, grid, scheme, dtype, unpacked)[1])


def bits_of(packed: torch.Tensor, scheme: Scheme, count: int) -> list[list[int]]:
    rows = []
    for words in packed.tolist():
        stream = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(words))
        mask = (1 << scheme.bits) - 1
        rows.append([((stream >> (scheme.bits * i)) & mask) + scheme.lowest for i in range(count)])
    return rows


def test_stored_bits_count_codes_scales_and_zero_points() -> None:
    expectations = {Scheme(3, 64, True): 3.25, Scheme(2, 64, False): 2 + 18 / 64, Scheme(4, 0, True): 4 + 16 / 512}
    for scheme, expected in expectations.items():
        specs = tensor_specs("x", (256, 512), scheme, "F16")
        assert sum(s.bytes for s in specs if not s.name.endswith("shape")) * 8 / (256 * 512) == expected


@pytest.mark.parametrize("family", slow_but("llama", "mixtral", of=PACKED))
def test_packed_results_of_every_family_load_with_stock_tools(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    experts = bool(ARCHITECTURES[family].experts)
    methods: dict[str, GridMethod] = {} if experts else {"mixed": GPTQ(bits=2.5, group_size=16)}
    for symmetric in (True,) if experts else (True, False):
        methods[f"rtn-{symmetric}"] = RTN(bits=3, symmetric=symmetric, group_size=16)
        methods[f"gptq-{symmetric}"] = GPTQ(bits=2, symmetric=symmetric, group_size=0)
    folders = [tmp_path / name for name in methods]
    for folder, method in zip(folders, methods.values(), strict=True):
        quantize(method, str(tiny[family]), folder, options(text_file, samples=4))
    for folder, found in zip(folders, stock_logits(folders, tmp_path), strict=True):
        assert (found - walked_logits(folder)).abs().max() < 1e-3, folder.name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_files_have_the_stated_bits_a_weight(bits: int, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    result = quantize(RTN(bits=bits, group_size=32), str(tiny["llama"]), tmp_path / "out", options(text_file, samples=4))
    found = load_file(tmp_path / "out" / "model.safetensors")
    dense = load_file(tiny["llama"] / "model.safetensors")
    stored = sum(t.numel() * t.element_size() for name, t in found.items() if name not in dense)
    weights = sum(t.numel() for name, t in dense.items() if name not in found)
    assert abs(8 * stored / weights / result["bits_per_weight"] - 1) < 1e-9
    assert inspect(str(tmp_path / "out"))["low_bit"]["bits"] == {str(bits): 21}
    assert inspect(str(tmp_path / "out"))["parameters"] == sum(t.numel() for t in dense.values())
