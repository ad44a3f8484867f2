"""quantization/smoothing.py: the folded network is the same network, and its channels are closer. Oracle and property tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import stock_logits, tokens, walked_logits

from compresskit.errors import RequestError
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.rtn import RTN
from compresskit.quantization.smoothing import ChannelMaxima, factors, smooth
from compresskit.stages import Options
from compresskit.walk.walk import Walk

Make = Callable[[Any, Path, Path], dict[str, Any]]
FOLDED = {"llama": 2, "qwen3": 2, "gemma3_text": 2, "gpt_neox": 2, "opt": 2, "phi": 0}
"""Norms of a block that can be folded; phi's attention and feed-forward network read one norm."""


@pytest.mark.parametrize("family", FOLDED)
def test_the_folded_network_is_the_same(family: str, tiny: dict[str, Path]) -> None:
    model = open_model(tiny[family])
    changed: dict[str, torch.Tensor] = {}
    walk = Walk(model, tokens(), Where(torch.device("cpu"), torch.float32))
    for block in walk:
        changed |= smooth(model, block, model.linears, 0.5)
    found = torch.cat([logits for _, _, logits in walk.logits()])
    assert float((found - walked_logits(tiny[family])).abs().max()) < 1e-4
    assert len({name.rpartition(".")[0] for name in changed}) == FOLDED[family] * model.block_count
    assert all(tensor.shape == model.checkpoint.spec(name).shape for name, tensor in changed.items())


def test_factors_are_equation_4_in_powers_of_two() -> None:
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(16, generator=generator) * 50
    weights = [torch.randn(5, 16, generator=generator), torch.randn(3, 16, generator=generator)]
    largest[3] = 0
    found = factors(largest, weights, 0.7)
    for channel in range(16):
        steepest = max(float(weight[:, channel].abs().max()) for weight in weights)
        exact = float(largest[channel]) ** 0.7 / steepest**0.3 if channel != 3 else 1.0
        assert 2**-0.5001 <= float(found[channel]) / exact <= 2**0.5001
        assert float(found[channel].log2()) == round(float(found[channel].log2()))


def test_maxima_are_those_of_all_batches() -> None:
    maxima = ChannelMaxima()
    for value in (1.0, -3.0, 2.0):
        maxima.add(torch.full((2, 3, 4), value))
    assert maxima.value is not None and maxima.value.tolist() == [3.0] * 4


def test_a_smoothed_result_opens_in_stock_tools_with_its_norms(make: Make, tiny: dict[str, Path], tmp_path: Path) -> None:
    result = make(GPTQ(format="int8", smoothing=0.5), tiny["llama"], tmp_path / "out")
    assert result["kl_held_back"] < 0.01
    (stock,) = stock_logits([tmp_path / "out"], tmp_path)
    assert float((stock - walked_logits(tmp_path / "out")).abs().max()) < 1e-3
    norm = "model.layers.1.input_layernorm.weight"
    before, after = (load_file(folder / "model.safetensors")[norm] for folder in (tiny["llama"], tmp_path / "out"))
    assert not torch.equal(before, after)
    assert torch.equal((before / after).log2(), (before / after).log2().round())


def test_other_formats_take_no_smoothing(tiny: dict[str, Path], tmp_path: Path) -> None:
    request = QuantizeRequest(RTN(format="fp8", smoothing=0.5), open_model(tiny["llama"]), tmp_path / "out", Options())
    with pytest.raises(RequestError, match=r"--smoothing 0\.5: is for --format int8"):
        request.check()
