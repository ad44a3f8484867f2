"""models/layouts.py: every layout loads with stock transformers and gives the logits of the model in memory. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from small_runs import prune, slow_but
from stock_tools import stock_logits, tokens, walked_logits
from tiny_models import FAMILIES
from transformers import AutoModelForCausalLM

from compresskit.errors import UnsupportedArchitecture
from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.layouts import can_be_ragged
from compresskit.pruning.cfsp import CFSP

RAGGED_FAMILIES = tuple(family for family in FAMILIES if can_be_ragged(ARCHITECTURES[family]))


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", "mixtral", "phi3", of=FAMILIES))
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


@pytest.mark.parametrize("family", slow_but("llama", "gpt2", "mixtral", "phi3", of=FAMILIES))
def test_padded_widths_compute_what_the_narrow_ones_do(
    family: str, tiny: dict[str, Path], text_file: Path, ragged: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = prune(tiny[family], out, text_file, CFSP(sparsity=0.3, allocation="global", layout="padded", round_to=4))
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        padded = stock(tokens()).logits
    assert (padded - walked_logits(out)).abs().max() < 1e-4
    assert result["layout"] in ("padded", "uniform")
    if family in RAGGED_FAMILIES:
        assert (padded - walked_logits(ragged[family])).abs().max() < 1e-4


@pytest.fixture(scope="module")
def ragged(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ragged checkpoints by family, made when first asked for."""
    root = tmp_path_factory.mktemp("ragged")

    class Models(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            result = prune(tiny[family], root / family, text_file, CFSP(sparsity=0.3, allocation="global", round_to=4))
            assert result["layout"] == "ragged"
            self[family] = root / family
            return self[family]

    return Models()


@pytest.mark.parametrize("family", RAGGED_FAMILIES)
def test_ragged_widths_load_where_compresskit_cannot_be_imported(family: str, ragged: dict[str, Path], tmp_path: Path) -> None:
    [logits] = stock_logits([ragged[family]], tmp_path)
    assert (logits - walked_logits(ragged[family])).abs().max() < 1e-4


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
