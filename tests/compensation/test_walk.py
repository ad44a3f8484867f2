"""compensation/walk.py: what full rank restores (oracle), what pruned and trained models win back. End to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft_space
import pytest
import torch
from compensation_runs import run
from stock_tools import stock_logits, walked_logits
from tiny_models import make_model

from compresskit.compensation.eora import EoRA
from compresskit.compensation.svd import SVD
from compresskit.errors import RequestError
from compresskit.models.load import open_any, open_model
from compresskit.models.meta import read_plain
from compresskit.models.scalings import scalings
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


@pytest.mark.parametrize("aim", ["weight", "output"])
def test_a_scaled_model_is_repaired_to_the_scaled_original(
    aim: str, tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path
) -> None:
    """At full rank it computes what the original does, though its weights are others."""
    source = tmp_path / "scaled"
    quantize(RTN(bits=3, group_size=16, scaling="awq"), str(tiny["llama"]), source, Options(**text))
    result = run(EoRA(rank=16, aim=aim), source, tmp_path / "out", tiny["llama"], text)
    assert result["kl_after"] < 0.2 * result["kl_before"]
    model, original = open_any(str(tmp_path / "out")), open_model(tiny["llama"])
    found = scalings(model, original)
    for name in [each for each in model.linears if each.endswith(("k_proj", "v_proj"))]:  # of 16 rows
        restored, wanted = (read_plain(each, f"{name}.weight").float() for each in (model, original))
        assert aim == "output" or torch.allclose(restored, found.scaled(name, wanted), atol=4e-3), name
        assert name not in found.columns or not torch.allclose(restored, wanted, atol=4e-3)


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


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside peft
@pytest.mark.parametrize(
    "drawn",
    [
        {"alpha_pattern": {"q_proj": 16}, "use_rslora": True, "style": "with the adapter's name"},
        {"rank_pattern": {"q_proj": 2}, "init_lora_weights": "pissa", "lora_alpha": 3},
        {"init_lora_weights": "olora", "use_rslora": True},
    ],
)
def test_an_adapter_that_a_source_brings_is_repaired_as_stock_peft_reads_it(
    drawn: dict[str, Any], text: dict[str, Any], tmp_path: Path
) -> None:
    base, original = (make_model(tmp_path / str(seed), "llama", seed) for seed in range(2))
    plain = {"r": 3, "target_modules": ["q_proj", "down_proj"], "dtype": torch.float32, "style": "saved"}
    brought = peft_space.make(base / "adapter", base, plain | drawn)
    assert brought is not None
    before, wanted = peft_space.stock_model(base).state_dict(), peft_space.stock_model(original).state_dict()
    held = shutil.move(brought, tmp_path / "brought")
    changes = peft_space.stock_change(held, base)
    shutil.copytree(held, base / "adapter")
    run(SVD(rank=2, output_weights="none", aim="weight"), base, tmp_path / "out", original, text)
    shutil.rmtree(base / "adapter")
    found = peft_space.stock_change(tmp_path / "out", base)
    for name, change in changes.items():
        missing = wanted[name].double() - before[name].double() - change
        u, values, vh = torch.linalg.svd(missing)
        expected = change + (u[:, :2] * values[:2]) @ vh[:2]
        torch.testing.assert_close(found[name], expected, atol=2e-3, rtol=2e-3)  # factors in 16 bits
