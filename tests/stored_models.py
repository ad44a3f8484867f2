"""Dense models stored in FP8 by code of their own, each beside the dense model that it stands for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of float8_e4m3fn."""
Parts = dict[str, Tensor]


def blocks_of(weight: Tensor, rows: int, columns: int) -> list[tuple[slice, slice]]:
    """The blocks of a weight, row by row."""
    out, inputs = weight.shape
    return [
        (slice(top, min(top + rows, out)), slice(left, min(left + columns, inputs)))
        for top in range(0, out, rows)
        for left in range(0, inputs, columns)
    ]


def in_blocks(weight: Tensor, rows: int, columns: int, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, one scale a block, the weight that they stand for in float32 before it is rounded), block by block."""
    codes, dense, scales = torch.empty(weight.shape, dtype=FP8), torch.empty(weight.shape), []
    for block in blocks_of(weight, rows, columns):
        scale = (weight[block].float().abs().max() / LARGEST).to(scale_dtype)
        codes[block] = (weight[block].float() / scale.float()).to(FP8)
        dense[block] = (codes[block].to(scale_dtype) * scale).float()
        scales.append(scale)
    return codes, torch.stack(scales).reshape(-(-weight.shape[0] // rows), -(-weight.shape[1] // columns)), dense


def fine_grained(rows: int, columns: int) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    def store(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        codes, scales, dense = in_blocks(weight, rows, columns)
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, dense

    return store


def per_tensor(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    codes, scales, dense = in_blocks(weight, *weight.shape)
    return {
        f"{name}.weight": codes,
        f"{name}.weight_scale_inv": scales.reshape(()),
        f"{name}.activation_scale": torch.ones(()),
    }, dense


def exponents(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    """Scales that are powers of two, stored as bytes."""
    rows, columns = weight.shape
    power = torch.stack([torch.frexp(part.abs().max())[1] for part in weight.float().reshape(rows, -1, 16).flatten(0, 1)])
    power = power.reshape(rows, columns // 16) - 8
    spread = torch.exp2(power.float())[..., None].expand(-1, -1, 16).flatten(1)
    codes = (weight.float() / spread).to(FP8)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": (power + 127).to(torch.uint8)}, codes.float() * spread


def compressed_tensors(
    rows: int, columns: int, shape: tuple[int, ...] | None = None, scale_dtype: torch.dtype = torch.float32
) -> Callable[[str, Tensor], tuple[Parts, Tensor]]:
    """`rows`, `columns`: of a block, 0 for all."""

    def store(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
        codes, scales, dense = in_blocks(weight, rows or weight.shape[0], columns or weight.shape[1], scale_dtype)
        parts = {f"{name}.weight": codes, f"{name}.weight_scale": scales.reshape(shape) if shape else scales}
        return parts | {f"{name}.input_scale": torch.ones(1)}, dense

    return store


def plain(name: str, weight: Tensor) -> tuple[Parts, Tensor]:
    codes = weight.to(FP8)
    return {f"{name}.weight": codes}, codes.float()


def fp8_config(**changes: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]} | changes


def ct_config(strategy: str, form: str = "float-quantized", **weights: Any) -> dict[str, Any]:
    stated = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": strategy} | weights
    inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": stated, "input_activations": inputs}},
        "ignore": ["lm_head"],
        "dequantize": True,
    }


Form = tuple[dict[str, Any] | None, Callable[[str, Tensor], tuple[Parts, Tensor]], str]
"""(quantization_config, how a linear is stored, dtype in config.json)."""
FORMS: dict[str, Form] = {
    "blocks": (fp8_config(weight_block_size=[16, 8]), fine_grained(16, 8), "bfloat16"),
    "blocks that divide nothing": (fp8_config(weight_block_size=[20, 24]), fine_grained(20, 24), "bfloat16"),
    "one block larger than all": (fp8_config(weight_block_size=[128, 128]), fine_grained(128, 128), "float32"),
    "blocks of 128 unstated": (fp8_config(), fine_grained(128, 128), "float16"),
    "one scale a tensor": (fp8_config(weight_block_size=None, activation_scheme="static"), per_tensor, "bfloat16"),
    "exponents": (fp8_config(weight_block_size=[1, 16], scale_fmt="ue8m0"), exponents, "bfloat16"),
    "compressed-tensors tensor": (ct_config("tensor"), compressed_tensors(0, 0, (1,)), "bfloat16"),
    "compressed-tensors channel": (ct_config("channel"), compressed_tensors(1, 0, None, torch.bfloat16), "float32"),
    "compressed-tensors block": (
        ct_config("block", "naive-quantized", block_structure=[16, 8]), compressed_tensors(16, 8), "bfloat16",
    ),
    "compressed-tensors group": (ct_config("group", group_size=16), compressed_tensors(1, 16), "float16"),
    "no scales": (None, plain, "float8_e4m3fn"),
}  # fmt: skip


def store_fp8(dense: Path, form: str, folder: Path) -> tuple[Path, Path]:
    """Store a checkpoint's blocks in a form; returns the folder in FP8 and the folder of the dense model that it stands for."""
    config, store, dtype = FORMS[form]
    as_stated = torch.bfloat16 if "float8" in dtype else getattr(torch, dtype)
    stored, meant = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        linear = name.removesuffix(".weight")
        if ".layers." in name and tensor.dim() == 2:
            parts, weight = store(linear, tensor)
            stored |= parts
            meant[name] = weight.to(as_stated)
        else:
            stored[name] = meant[name] = tensor.to(as_stated)
    source = json.loads((dense / "config.json").read_text())
    configs = [source | {"dtype": dtype}, source | {"dtype": str(as_stated).removeprefix("torch.")}]
    if config is not None:
        configs[0]["quantization_config"] = config
    found = folder / "fp8", folder / "dense"
    for path, tensors, each in zip(found, (stored, meant), configs, strict=True):
        shutil.copytree(dense, path, ignore=shutil.ignore_patterns("*.safetensors"))
        (path / "config.json").write_text(json.dumps(each))
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors", metadata={"format": "pt"}
        )
    return found
