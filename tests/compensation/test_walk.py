"""compensation/walk.py: what full rank restores (oracle), what pruned and trained models win back. End to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compensation_runs import run
from stock_tools import stock_logits, walked_logits

from compresskit.compensation.eora import EoRA
from compresskit.errors import RequestError
from compresskit.models.load import open_any, open_model
from compresskit.models.meta import read_plain
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune
from compresskit.quantization.apiq.method import ApiQ
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options


def test_full_rank_restores_the_original(tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path) -> None:
    run(EoRA(rank=16), rounded, tmp_path / "out", tiny["llama"], text)
    model, original = open_any(str(tmp_path / "out")), open_model(tiny["llama"])
    for name in model.linears:
        if min(model.linear_shape(name)) == 16:
            restored, wanted = (read_plain(each, f"{name}.weight").float() for each in (model, original))
            assert torch.allclose(restored, wanted, atol=2e-3), name


@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_a_pruned_model_wins_back_some_of_its_output(
    layout: str, tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path
) -> None:
    pruned = tmp_path / "pruned"
    prune(CFSP(sparsity=0.4, layout=layout, refit=False, round_to=16), str(tiny["llama"]), pruned, Options(**text))
    result = run(EoRA(rank=8), pruned, tmp_path / "out", tiny["llama"], text)
    assert result["settings"]["aim"] == "block"
    assert result["kl_after"] < result["kl_before"]


def test_what_a_pruning_left_alone_has_no_error_to_repair(tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    """On the same inputs linears that kept all channels give what the original gives; only the others lack something."""
    pruned = tmp_path / "pruned"
    prune(CFSP(sparsity=0.4, round_to=16), str(tiny["llama"]), pruned, Options(**text))
    run(EoRA(rank=8), pruned, tmp_path / "out", tiny["llama"], text)
    facts = json.loads((tmp_path / "out" / "compresskit.json").read_text())["facts"]["blocks"]
    unpruned = [block["error_before"][name] for block in facts for name in ("self_attn.q_proj", "mlp.gate_proj")]
    pruned_errors = [block["error_before"]["mlp.down_proj"] for block in facts]
    assert max(unpruned) < 1e-4 * max(pruned_errors)


def test_a_pruned_and_quantised_model_is_repaired_with_a_budget(
    tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path
) -> None:
    prune(CFSP(sparsity=0.3, round_to=16), str(tiny["llama"]), tmp_path / "p", Options(**text))
    quantize(RTN(bits=2, group_size=16), str(tmp_path / "p"), tmp_path / "q", Options(**text))
    for original in (tiny["llama"], tmp_path / "p"):
        out = tmp_path / f"out-{original.name}"
        result = run(EoRA(rank_budget=0.3), tmp_path / "q", out, original, text)
        assert result["kl_after"] < result["kl_before"]
    manifest = json.loads((tmp_path / "out-p" / "compresskit.json").read_text())
    assert [manifest["stage"], manifest["source"]["stage"], manifest["source"]["source"]["stage"]] == [
        "compensate", "quantize", "prune",
    ]  # fmt: skip


def test_the_adapter_of_apiq_and_the_new_one_become_one(tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    trained = tmp_path / "q"
    quantize(ApiQ(bits=2, group_size=16, rank=4, epochs=1), str(tiny["llama"]), trained, Options(**text))
    result = run(EoRA(rank=4), trained, tmp_path / "out", tiny["llama"], text)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8
    assert result["settings"]["aim"] == "block"
    assert result["kl_after"] < result["kl_before"]
    [logits] = stock_logits([tmp_path / "out"], tmp_path)
    assert (logits - walked_logits(tmp_path / "out")).abs().max() < 1e-3
    with pytest.raises(RequestError, match="adapter-bits"):
        run(EoRA(rank=4, adapter_bits=8), trained, tmp_path / "no", tiny["llama"], text)
    merged = run(EoRA(rank=4), trained, tmp_path / "merged", tiny["llama"], text, merge=True)
    assert merged["parameters_after"] == open_model(tmp_path / "merged").parameters < merged["parameters_before"]
