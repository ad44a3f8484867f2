"""quantization/activation_scales.py: against the magnitudes and the cache of stock transformers. Oracle tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import run_stock, stock_logits, tokens, walked_logits
from transformers import AutoModelForCausalLM, DynamicCache

from compresskit.formats.fixed import fixed_scheme
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.quantization.activation_scales import block_scales
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.rtn import RTN
from compresskit.walk.walk import Walk

Make = Callable[[Any, Path, Path], dict[str, Any]]
EMULATED = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
tokens, folder = torch.load(arguments[0]), arguments[1]
config = AutoConfig.from_pretrained(folder)
config.quantization_config = {**config.quantization_config, "dequantize": False}
model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.bfloat16).eval()
with torch.no_grad():
    torch.save(model(tokens).logits.float(), folder + ".emulated")
"""


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_neox"])
def test_scales_are_those_of_what_the_stock_network_sees(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    found: dict[str, torch.Tensor] = {}
    for block in Walk(model, tokens(), Where(torch.device("cpu"), torch.float32)):
        found |= block_scales(model, block, model.linears, fixed_scheme("fp8", "static"), cached=True)
    network = AutoModelForCausalLM.from_pretrained(tiny[family], dtype=torch.float32).eval()
    largest: dict[str, float] = {}
    for name in model.linears:
        hook = lambda _, args, name=name: largest.update({name: float(args[0].abs().max())})  # noqa: E731
        network.get_submodule(name).register_forward_pre_hook(hook)
    cache = DynamicCache()
    with torch.no_grad():
        network(tokens(), cache=cache, use_cache=True)
    expected = {f"{model.stored_name(name)}.input_scale": value / 448 for name, value in largest.items()}
    for index, layer in enumerate(cache.layers):
        name = f"{model.block_name(index)}.{model.architecture.block(index).mixer}"
        expected |= {f"{name}.k_scale": float(layer.keys.abs().max()) / 448}
        expected |= {f"{name}.v_scale": float(layer.values.abs().max()) / 448}
    assert found.keys() == expected.keys()
    assert all(abs(float(found[name]) / expected[name] - 1) < 1e-4 for name in expected)


def test_nvfp4_s_divisor_maps_the_largest_input_to_the_largest_of_both_floats(tiny: dict[str, Path]) -> None:
    model = open_model(tiny["llama"])
    block = next(iter(Walk(model, tokens(), Where(torch.device("cpu"), torch.float32))))
    kinds = [fixed_scheme("nvfp4", "dynamic"), fixed_scheme("fp8", "static")]
    divisors, scales = (block_scales(model, block, model.linears, each, cached=False) for each in kinds)
    for name, divisor in divisors.items():
        assert abs(float(divisor) * float(scales[name.replace("_global", "")]) / 6 - 1) < 1e-5


@pytest.mark.parametrize(
    "method",
    [RTN(format="fp8", activations="static", kv_cache="fp8"), GPTQ(format="nvfp4", activations="dynamic"), GPTQ(kv_cache="fp8")],
    ids=["fp8", "nvfp4", "packed"],
)
def test_results_with_scales_open_in_stock_tools(method: Any, make: Make, tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = make(method, tiny["llama"], folder)
    assert result["kl_held_back"] < 0.05
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["kv_cache_scheme"] is not None) == (method.kv_cache is not None)
    stored = load_file(folder / "model.safetensors")
    scales = [name for name in stored if name.rpartition(".")[2] in ("k_scale", "v_scale", "input_scale", "input_global_scale")]
    assert len(scales) == (6 if method.kv_cache else 0) + (21 if method.format != "packed" else 0)
    (stock,) = stock_logits([folder], tmp_path)
    assert float((stock - walked_logits(folder)).abs().max()) < 1e-3
    if method.format != "packed":
        torch.save(tokens(), tmp_path / "tokens.pt")
        run_stock(EMULATED, [str(tmp_path / "tokens.pt"), str(folder)], tmp_path)
        assert float((torch.load(f"{folder}.emulated") - stock).abs().mean()) < 0.1
