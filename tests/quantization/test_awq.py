"""quantization/awq.py: the exponent by brute force, what is written in stock tools, refusals. Oracle and end to end tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import stock_logits, tokens, walked_logits

from compresskit.errors import NumericalError, RequestError
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.models.meta import read_plain
from compresskit.models.scalings import scalings
from compresskit.quantization import awq, cost
from compresskit.quantization.apiq.method import ApiQ
from compresskit.quantization.gptq import GPTQ
from compresskit.quantization.method import QuantizeMethod
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options
from compresskit.walk.walk import Walk

Make = Callable[[Any, Path, Path], dict[str, Any]]
PARTS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.v_proj",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.up_proj",
}


def rounded(weight: torch.Tensor, size: int, bits: int) -> torch.Tensor:
    """Each group's weights on a grid from its smallest to its largest, with 0 on it."""
    found = weight.clone()
    for row in found:
        for start in range(0, len(row), size):
            group = row[start : start + size]
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            step = (high - low) / (2**bits - 1)
            zero = round(-low / step)
            row[start : start + size] = step * (((group / step).round() + zero).clamp(0, 2**bits - 1) - zero)
    return found


def test_the_exponent_is_that_of_the_least_error_of_the_outputs(tiny: dict[str, Path]) -> None:
    """Of the queries, keys and values, and of the shared heads' output, from the inputs themselves in float64."""
    model = open_model(tiny["llama"])
    method = RTN(bits=2, group_size=8, symmetric=False, scaling="awq")
    block = next(iter(Walk(model, tokens(), Where(torch.device("cpu"), torch.float32))))
    seen: dict[str, list[torch.Tensor]] = {"self_attn.q_proj": [], "self_attn.o_proj": []}
    for name, inputs in seen.items():
        block.module.get_submodule(name).register_forward_pre_hook(lambda _, x, kept=inputs: kept.append(x[0].flatten(0, -2)))
    block.run(block.hidden[0], 0)
    whole = {name: torch.cat(inputs[:1]).double() for name, inputs in seen.items()}
    weights = {name: block.linear(name).weight.double().clone() for name in model.block_linears(0)}
    grids = dict.fromkeys(model.linears, method.scheme(model))
    _, facts = awq.Scaler(model, grids, torch.float32, method.nearest)(block)
    for first, others in (("self_attn.q_proj", ("q", "k", "v")), ("self_attn.o_proj", ("o",))):
        x = whole[first]
        magnitude = x.abs().mean(dim=0)
        if first == "self_attn.o_proj":  # two heads of 8 channels read each of two heads of values
            magnitude = magnitude.view(2, 2, 8).mean(dim=1).flatten()
        errors = []
        for step in range(20):
            s = magnitude ** (step / 20)
            s /= (s.max() * s.min()).sqrt()
            if first == "self_attn.o_proj":
                s = torch.cat([s[:8], s[:8], s[8:], s[8:]])
            errors.append(
                sum(
                    float(((rounded(w * s, 8, 2) / s - w) @ x.T).square().sum())
                    for w in (weights[f"{block.name}.self_attn.{each}_proj"] for each in others)
                )
            )
        found = facts["scaling"][first]
        best = min(range(20), key=errors.__getitem__)
        assert found["exponent"] == best / 20 and best > 0
        assert found["error"] == pytest.approx(errors[best] / errors[0], rel=0.02)


@pytest.mark.parametrize(
    "method",
    [
        RTN(bits=3, group_size=8, scaling="awq"),
        GPTQ(bits=3, group_size=8, scaling="awq", guide="fisher"),
        RTN(format="int8", scaling="awq"),
        pytest.param(ApiQ(bits=2, group_size=16, rank=4, epochs=1, scaling="awq"), marks=pytest.mark.slow),
    ],
    ids=["rtn", "gptq", "int8", "apiq"],
)
def test_a_scaled_result_opens_in_stock_tools_with_its_norms(
    method: QuantizeMethod, make: Make, tiny: dict[str, Path], tmp_path: Path
) -> None:
    result = make(method, tiny["llama"], tmp_path / "out")
    (stock,) = stock_logits([tmp_path / "out"], tmp_path)
    assert float((stock - walked_logits(tmp_path / "out")).abs().max()) < 1e-3
    assert {name: part["blocks"] for name, part in result["scaling"].items()} == dict.fromkeys(PARTS, 3)
    facts = json.loads((tmp_path / "out" / "compresskit.json").read_text())["facts"]["blocks"]
    assert all({name: fact["into"] for name, fact in block["scaling"].items()} == PARTS for block in facts)
    assert all(fact["error"] <= 1 for block in facts for fact in block["scaling"].values())
    moved = [index for index, block in enumerate(facts) if block["scaling"]["self_attn.q_proj"]["exponent"]]
    assert moved
    names = [f"model.layers.{index}.input_layernorm.weight" for index in moved]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny["llama"], tmp_path / "out"))
    assert not any(torch.equal(before[name], after[name]) for name in names)


def test_in_8_bits_each_weight_is_the_originals_with_the_recorded_factors(
    make: Make, tiny: dict[str, Path], tmp_path: Path
) -> None:
    make(RTN(bits=8, group_size=8, scaling="awq"), tiny["llama"], tmp_path / "out")
    model, original = open_model(tmp_path / "out"), open_model(tiny["llama"])
    found = scalings(model, original)
    assert set(found.rows) <= {name for name in model.linears if name.endswith(("v_proj", "up_proj"))} and found.rows
    for name in model.linears:
        stored, wanted = (read_plain(each, f"{name}.weight").float() for each in (model, original))
        scaled = found.scaled(name, wanted)
        off, unscaled = float((stored - scaled).norm() / scaled.norm()), float((stored - wanted).norm() / wanted.norm())
        assert off < 0.01 and (name not in found.columns or unscaled > 2 * off), name
    assert not scalings(model, model).columns  # as its own original it has the same weights


def test_experts_and_linears_without_a_fold_are_left_and_named(make: Make, tiny: dict[str, Path], tmp_path: Path) -> None:
    result = make(RTN(bits=4, group_size=8, scaling="awq"), tiny["qwen3_moe"], tmp_path / "moe")
    assert {name: part["blocks"] for name, part in result["scaling"].items()} == {"self_attn.q_proj": 3, "self_attn.o_proj": 3}
    result = make(RTN(bits=4, group_size=8, scaling="awq"), tiny["phi"], tmp_path / "phi")
    assert result["scaling"]["self_attn.q_proj"] == {"blocks": 0, "relative_error": None}
    assert result["scaling"]["self_attn.dense"]["blocks"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [RTN(bits=3, group_size=8, scaling="awq"), ApiQ(bits=2, group_size=8, rank=0, epochs=1, scaling="awq")],
    ids=["rtn", "apiq"],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    method: QuantizeMethod, tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"calibration": str(text_file), "samples": 4, "sequence_length": 64}
    quantize(method, str(tiny["llama"]), tmp_path / "whole", Options(**given))
    scale, calls = awq.Scaler.__call__, []

    def stop(self: awq.Scaler, block: Any) -> Any:
        calls.append(block.index)
        if block.index == 2:
            raise NumericalError("stopped")
        return scale(self, block)

    with monkeypatch.context() as patched, pytest.raises(NumericalError, match="stopped"):
        patched.setattr(awq.Scaler, "__call__", stop)
        quantize(method, str(tiny["llama"]), tmp_path / "out", Options(**given))
    assert calls == [0, 1, 2]
    quantize(method, str(tiny["llama"]), tmp_path / "out", Options(**given, resume=True))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert first == second


def test_what_overflows_is_no_candidate_and_dead_channels_have_no_factor() -> None:
    assert awq.least({0.0: 2.0, 0.5: float("nan"), 0.9: float("inf"), 0.95: 1.0}) == 0.95
    assert awq.least({0.0: float("nan"), 0.5: float("inf")}) == 0.0
    assert awq.least({0.0: 1.0, 0.5: 1.0}) == 0.0
    factors = awq.factors_of(torch.tensor([4.0, 0.0, 0.25]), 0.5)
    assert factors.tolist() == [2.0, 1.0, 0.5]
    assert awq.factors_of(torch.zeros(3), 0.5).tolist() == [1.0] * 3


def test_more_passes_are_planned(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(tiny["llama"])
    plain, scaled = (
        QuantizeRequest(GPTQ(bits=3, scaling=each), model, tmp_path / "out", Options(samples=8)) for each in ("none", "awq")
    )
    assert scaled.passes() > plain.passes() + 8
    assert scaled.peak_bytes() >= plain.peak_bytes()
    assert len(awq.EXPONENTS) == cost.EXPONENTS


def test_what_scales_the_same_inputs_or_weights_is_refused(tiny: dict[str, Path], tmp_path: Path) -> None:
    for method, said in (
        (RTN(format="int8", smoothing=0.5, scaling="awq"), "--scaling awq: --smoothing scales the same inputs"),
        (ApiQ(bits=2, rank=0, saliency="fisher", scaling="awq"), "--scaling awq: --saliency fisher is of"),
    ):
        with pytest.raises(RequestError, match=said):
            QuantizeRequest(method, open_model(tiny["llama"]), tmp_path / "out", Options()).check()
