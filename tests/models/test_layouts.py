"""Every layout loads with stock transformers and gives the logits of the model that was in memory. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from stock_tools import stock_logits, tokens, walked_logits
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM

from compresskit.errors import UnsupportedArchitecture
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.layouts import can_be_ragged
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.flap import FLAP
from compresskit.pruning.run import prune as prune_stage
from compresskit.stages import Options

RAGGED_FAMILIES = tuple(family for family in FAMILIES if can_be_ragged(ARCHITECTURES[family]))


def prune(source: Path, out: Path, text: Path, method: CFSP | FLAP) -> dict[str, object]:
    options = Options(calibration=str(text), samples=8, sequence_length=64)
    return prune_stage(method, str(source), out, options)


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_widths_give_a_plain_checkpoint(family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = prune(tiny[family], out, text_file, CFSP(sparsity=0.25, allocation="uniform", round_to=8))
    assert result["layout"] == "uniform"
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert (stock(tokens()).logits - walked_logits(out)).abs().max() < 1e-4
    before, after = json.loads((tiny[family] / "config.json").read_text()), json.loads((out / "config.json").read_text())
    assert before.keys() == after.keys()
    assert result["parameters_after"] < result["parameters_before"]


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_widths_compute_what_the_narrow_ones_do(
    family: str, tiny: dict[str, Path], text_file: Path, ragged: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = prune(tiny[family], out, text_file, CFSP(sparsity=0.3, allocation="global", layout="padded", round_to=4))
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        padded = stock(tokens()).logits
    assert (padded - walked_logits(out)).abs().max() < 1e-4
    assert result["layout"] in ("padded", "uniform")
    if family in RAGGED_FAMILIES:
        assert (padded - walked_logits(ragged / family)).abs().max() < 1e-4


@pytest.fixture(scope="module")
def ragged(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ragged checkpoint a family, with the logits that stock transformers gives where compresskit cannot be imported."""
    root = tmp_path_factory.mktemp("ragged")
    for family in RAGGED_FAMILIES:
        result = prune(tiny[family], root / family, text_file, CFSP(sparsity=0.3, allocation="global", round_to=4))
        assert result["layout"] == "ragged"
    stock_logits([root / family for family in RAGGED_FAMILIES], root)
    return root


@pytest.mark.parametrize("family", RAGGED_FAMILIES)
def test_ragged_widths_load_where_compresskit_cannot_be_imported(family: str, ragged: Path) -> None:
    assert (torch.load(ragged / f"{family}.logits") - walked_logits(ragged / family)).abs().max() < 1e-4


def test_registered_classes_load_ragged_checkpoints_without_their_code(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    import compresskit

    prune(tiny["qwen2"], tmp_path / "out", text_file, CFSP(sparsity=0.3, allocation="global", round_to=4))
    compresskit.register()
    compresskit.register()
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert (stock(tokens()).logits - walked_logits(tmp_path / "out")).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_neox"])
def test_families_that_stock_tools_convert_refuse_the_ragged_layout_before_any_work(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedArchitecture, match="--allocation uniform, or --layout padded"):
        prune(tiny[family], tmp_path / "out", text_file, CFSP(sparsity=0.3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_saving_a_pruned_checkpoint_again_gives_the_same_bytes(
    layout: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    method = CFSP.model_validate({"sparsity": 0.3, "allocation": "global", "layout": layout, "round_to": 4})
    prune(tiny["llama"], first, text_file, method)
    prune(first, second, text_file, CFSP(sparsity=0, layout="ragged"))
    for name in ("model.safetensors", "config.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_sparsity_zero_returns_the_same_weights(family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    prune(tiny[family], tmp_path / "out", text_file, CFSP(sparsity=0))
    before, after = load_file(tiny[family] / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_flaps_bias_is_zero_in_blocks_that_keep_every_channel(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    result = prune(tiny["llama"], tmp_path / "out", text_file, FLAP(sparsity=0.03, round_to=8))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    widths = [block[0] for block in result["widths"]]  # type: ignore[attr-defined]
    assert sorted(widths) == [88, 96, 96]
    for index, width in enumerate(widths):
        bias = tensors[f"model.layers.{index}.mlp.down_proj.bias"]
        assert bool(bias.any()) == (width < 96)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2"])
def test_flaps_bias_is_stored_where_the_family_has_one(
    family: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    result = prune(tiny[family], tmp_path / "out", text_file, FLAP(sparsity=0.3, round_to=4))
    assert result["output_bias"] == (family != "qwen2")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        assert (stock(tokens()).logits - walked_logits(tmp_path / "out")).abs().max() < 1e-4
