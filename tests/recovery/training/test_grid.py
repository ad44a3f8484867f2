"""recovery/training/grid.py: gradients against autograd, the start, stored dtypes, the trained model in stock tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recovery_data import options
from stock_tools import tokens, walked_logits
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.small_files import read_json
from compresskit.errors import RequestError
from compresskit.formats.compressed_tensors import PackQuantized
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.numerics.grid import min_max_grid, to_codes
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Random
from compresskit.recovery.training.grid import GridLinear, GridModel, Relative, start_latent
from compresskit.recovery.training.networks import whole_network
from compresskit.stages import Options

pytest.importorskip("scipy")

SCHEMES = st.builds(Scheme, bits=st.sampled_from([2, 3, 4]), group_size=st.sampled_from([0, 4]), symmetric=st.booleans())


def linear_of(scheme: Scheme, seed: int, dtype: torch.dtype = torch.float32) -> tuple[GridLinear, torch.Tensor]:
    """A linear (3, 8) on a grid, its latents up to two steps off the codes and some beyond them, and an original weight."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=generator)
    grid = min_max_grid(weight, scheme, dtype)
    codes = to_codes(weight, grid, scheme).to(torch.int8)
    latent = start_latent(codes, grid.zero_point, grid.scale, scheme, weight)
    moved = latent + 4 * torch.rand(3, 8, generator=generator) - 2
    return GridLinear(moved, grid.zero_point, grid.scale.to(dtype), scheme, None), weight


@settings(max_examples=30, deadline=None)
@given(SCHEMES, st.integers(0, 99))
def test_the_gradients_are_those_of_autograd_through_a_straight_rounding(scheme: Scheme, seed: int) -> None:
    linear, _ = linear_of(scheme, seed)
    inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed + 1))
    linear(inputs).square().sum().backward()
    latent = linear.latent.detach().clone().requires_grad_()
    change = torch.zeros_like(linear.scale).requires_grad_()
    rounded = latent + (latent.round() - latent).detach()
    kept = rounded.clamp(scheme.lowest, scheme.highest).reshape(3, scheme.groups(8), -1)
    weight = (kept - linear.zero_point[..., None]) * (linear.scale.detach() + linear.scale.detach().abs() * change)[..., None]
    (inputs @ weight.flatten(1).T).square().sum().backward()
    assert latent.grad is not None and change.grad is not None and linear.latent.grad is not None
    inside = (latent.round() > scheme.lowest) & (latent.round() < scheme.highest)  # clamp's own gradient differs at the border
    assert torch.allclose(linear.latent.grad[inside], latent.grad[inside], atol=1e-4)
    beyond = (latent.round() < scheme.lowest) | (latent.round() > scheme.highest)
    assert not linear.latent.grad[beyond].any()
    found = linear.parametrizations.scale.original.grad  # type: ignore[union-attr]
    assert torch.allclose(found, change.grad, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(SCHEMES, st.integers(0, 99), st.sampled_from([torch.float16, torch.bfloat16]))
def test_a_linear_starts_at_the_stored_weight_and_on_its_originals_side(scheme: Scheme, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=generator)
    grid = min_max_grid(weight, scheme, dtype)
    codes = torch.randint(scheme.lowest, scheme.highest + 1, (3, 8), generator=generator).to(torch.int8)
    latent = start_latent(codes, grid.zero_point, grid.scale, scheme, weight)
    assert torch.equal(latent.round(), codes.float())
    exact = weight / grid.scale.repeat_interleave(8 // grid.scale.shape[1], 1)
    exact += grid.zero_point.repeat_interleave(8 // grid.scale.shape[1], 1)
    assert torch.equal(latent > codes, exact > codes) and float((latent - codes).abs().max()) <= 0.451
    linear = GridLinear(latent, grid.zero_point, grid.scale.to(dtype), scheme, None)
    stored, fixed = linear.stored(), GridLinear(codes, grid.zero_point, grid.scale.to(dtype), scheme, None)
    assert torch.equal(stored["weight_scale"], grid.scale.to(dtype))
    assert torch.equal(linear.weight, fixed.weight) and fixed.latent.dtype == torch.int8


def test_an_original_of_another_shape_tells_nothing() -> None:
    scheme, codes = Scheme(2, 0, True), torch.zeros(3, 8, dtype=torch.int8)
    latent = start_latent(codes, torch.zeros(3, 1), torch.ones(3, 1), scheme, torch.ones(3, 12))
    assert torch.equal(latent, torch.zeros(3, 8))


def test_a_vector_moves_in_shares_of_its_values_and_is_rounded_to_its_dtype() -> None:
    relative = Relative(torch.tensor([2.0, -0.5, 0.0]), torch.bfloat16)
    found = relative(torch.tensor([0.251, 0.251, 0.251]))
    assert torch.equal(found, torch.tensor([2.502, -0.3745, 0.0]).bfloat16().float())


def low(source: Path, folder: Path, **settings: Any) -> Path:
    quantize(
        RTN(**({} if "format" in settings else {"bits": 2, "group_size": 16}) | settings),
        str(source),
        folder,
        Options(samples=2, sequence_length=64),
    )
    return folder


def test_latents_of_a_scaled_model_start_at_the_scaled_original(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    """A code is the nearest to the weight at which its latent starts: few reach the border of their cell."""
    asked = Options(samples=2, sequence_length=64, calibration=str(text_file))
    quantize(RTN(bits=8, group_size=16, scaling="awq"), str(tiny["llama"]), tmp_path / "low", asked)
    model, original = open_model(tmp_path / "low"), open_model(tiny["llama"])
    trained = GridModel(whole_network(model, Where(torch.device("cpu"), torch.float32)), model, original)
    for name in model.linears:
        latent = trained.network.get_submodule(name).latent
        assert float(((latent - latent.round()).abs() > 0.449).float().mean()) < 0.15, name  # a tenth, by chance


@pytest.mark.parametrize(("train", "family", "symmetric"), [("all", "llama", False), ("scales", "qwen2", True)])
def test_a_low_bit_model_keeps_its_format_and_comes_nearer(
    train: str, family: str, symmetric: bool, tiny: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    source, out = low(tiny[family], tmp_path / "low", symmetric=symmetric), tmp_path / "out"
    asked = options(tiny[family], data, steps=16, update="grid", train=train, learning_rate=1e-2, code_distance=0.5)
    result = recover(Random(budget=0.5), str(source), out, asked)
    report = json.loads((out / "recover.json").read_text())
    assert report["kept"] == "trained" and result["held_back_after"]["loss"] < result["held_back_before"]["loss"]
    assert report["losses"][-1] < report["losses"][0]
    before, after = (open_model(folder) for folder in (source, out))
    specs = [{n: (s.dtype, s.shape) for n, s in each.checkpoint.tensors.items()} for each in (before, after)]
    assert specs[0] == specs[1] and before.checkpoint.config == after.checkpoint.config and after.adapter is None
    changed = {n for n in specs[0] if not torch.equal(before.checkpoint.read(n), after.checkpoint.read(n))}
    leaves = {name.rpartition(".")[2] if ".weight_" in name else name.rpartition(".")[0].rpartition(".")[2] for name in changed}
    assert "weight_scale" in leaves and any("norm" in leaf for leaf in leaves)
    assert ("weight_packed" in leaves) == (train == "all")
    assert not any("embed" in name or "zero_point" in name for name in changed)
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(tokens()).logits, walked_logits(out), atol=1e-4)


def test_a_training_that_makes_held_back_text_worse_keeps_the_start(
    tiny: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out, said = low(tiny["llama"], tmp_path / "low"), tmp_path / "out", [1.5, 2.5]
    monkeypatch.setattr("compresskit.recovery.training.steps.mean_loss", lambda *_: said.pop(0))
    asked = options(tiny["llama"], data, steps=2, update="grid")
    recover(Random(budget=0.5), str(source), out, asked)
    assert json.loads((out / "recover.json").read_text())["kept"] == "start"
    assert sha256(out / "model.safetensors") == sha256(source / "model.safetensors")


def test_windows_of_plain_text_are_trained_on(tiny: dict[str, Path], data: Path, text_file: Path, tmp_path: Path) -> None:
    source = low(tiny["llama"], tmp_path / "low")
    asked = options(tiny["llama"], data, steps=2, update="grid", text_samples=6, calibration=str(text_file), batch_size=30)
    recover(Random(budget=0.1), str(source), tmp_path / "out", asked)
    report = json.loads((tmp_path / "out" / "recover.json").read_text())
    assert report["text_samples"] == 6 and report["tokens_learned"] > 2 * 6 * 255


@pytest.mark.parametrize(
    ("what", "changes", "message"),
    [
        ("dense", {}, "this is dense; use --update full"),
        ("low", {"adapter_only": True}, "trains no adapter"),
        ("eight", {}, "are stored otherwise; quantize"),
    ],
)
def test_what_has_no_grid_to_train_is_refused(
    what: str, changes: dict[str, Any], message: str, tiny: dict[str, Path], data: Path, tmp_path: Path
) -> None:
    folder = tiny["llama"]
    if what == "low":
        folder = low(folder, tmp_path / "low")
    if what == "eight":
        folder = low(folder, tmp_path / "low", format="int8")
        assert not isinstance(open_model(folder).format, PackQuantized)
    with pytest.raises(RequestError, match=message):
        recover(Random(budget=0.5), str(folder), tmp_path / "out", options(tiny["llama"], data, update="grid", **changes))


def test_an_interrupted_training_ends_as_if_it_had_not_been(
    tiny: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = low(tiny["llama"], tmp_path / "low")
    asked = options(
        tiny["llama"], data, steps=4, update="grid", train="all", checkpoint_steps=2, precision="float32", held_back=0.0
    )
    recover(Random(budget=0.5), str(source), tmp_path / "whole", asked)

    def interrupted(_: Any, __: Any, state: Any, control: Any, **___: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("compresskit.recovery.training.trainer._Watch.on_step_end", interrupted)
        recover(Random(budget=0.5), str(source), tmp_path / "out", asked)
    recover(Random(budget=0.5), str(source), tmp_path / "out", asked.model_copy(update={"resume": True}))
    assert read_json(tmp_path / "out" / "recover.json")["judged"] is None
    digests = [sha256(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert digests[0] == digests[1] != sha256(source / "model.safetensors")
