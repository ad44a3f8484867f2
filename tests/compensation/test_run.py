"""compensation/run.py: stock tools load what it writes, and interrupted runs go on. End to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from compensation_runs import run
from safetensors.torch import load_file, save_file
from small_runs import slow_but
from stock_tools import stock_logits, walked_logits
from tiny_models import make_model

from compresskit.checkpoint.reader import tensors_in
from compresskit.checkpoint.writer import Writer
from compresskit.compensation.act import Act
from compresskit.compensation.eora import EoRA
from compresskit.compensation.method import CompensateMethod
from compresskit.compensation.svd import SVD
from compresskit.errors import UnsupportedArchitecture
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.formats.peft import WEIGHTS
from compresskit.quantization.nf4 import NF4
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options


@pytest.mark.slow
def test_adapters_and_merged_models_give_our_logits_in_stock_tools(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    methods: dict[str, CompensateMethod] = {
        "eora": EoRA(rank=4),
        "eight": EoRA(rank=4, adapter_bits=8),
        "budget": EoRA(rank_budget=0.2, round_rank=2),
        "output": EoRA(rank=4, aim="output"),
        "ignoring": EoRA(rank=4, ignore=("down",)),
        "svd": SVD(rank=4),
        "act": Act(rank=4),
    }
    for name, method in methods.items():
        run(method, rounded, tmp_path / name, tiny["llama"], text)
    for name in ("eora", "eight", "ignoring"):
        run(methods[name], rounded, tmp_path / f"{name}-merged", tiny["llama"], text, merge=True)
    folders = [tmp_path / name for name in (*methods, "eora-merged", "eight-merged", "ignoring-merged")]
    found = dict(zip(folders, stock_logits(folders, tmp_path), strict=True))
    for folder, logits in found.items():
        assert (logits - walked_logits(folder)).abs().max() < 1e-3, folder.name
    for name in ("eora", "eight", "ignoring"):
        assert (found[tmp_path / name] - found[tmp_path / f"{name}-merged"]).abs().max() < 1e-3, name
    sizes = [sum(spec.bytes for spec in tensors_in(tmp_path / name / WEIGHTS)) for name in ("eora", "eight")]
    assert sizes[1] * 2 == sizes[0]


@pytest.mark.parametrize(
    "family", slow_but("qwen2", of=("qwen2", "gemma2", "phi3", "opt", "gpt_neox", "mixtral", "qwen2_moe", "gpt2"))
)
def test_every_kind_of_family_is_repaired(family: str, tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    experts = family in ("mixtral", "qwen2_moe")
    merge, folder, out = experts or family == "gpt2", tmp_path / "low", tmp_path / "out"
    method = NF4() if family == "gpt2" else RTN(bits=2, group_size=16, symmetric=experts)
    quantize(method, str(tiny[family]), folder, Options(**text))
    result = run(EoRA(rank=8), folder, out, tiny[family], text, merge=merge)
    assert result["kl_after"] < result["kl_before"]
    if merge:
        with pytest.raises(UnsupportedArchitecture, match="--merge"):
            run(EoRA(rank=8), folder, tmp_path / "no", tiny[family], text)
    [logits] = stock_logits([out], tmp_path)
    assert (logits - walked_logits(out)).abs().max() < 1e-3


def test_a_dense_checkpoint_of_another_tool_is_repaired(tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    """Half of every linear's weights set to zero: the same architecture, other weights, no manifest."""
    sparse = make_model(tmp_path / "sparse", "llama")
    weights = load_file(sparse / "model.safetensors")
    for name, weight in weights.items():
        if "proj" in name:
            weight[weight.abs() < weight.abs().median()] = 0
    save_file(weights, sparse / "model.safetensors", metadata={"format": "pt"})
    result = run(EoRA(rank=8), sparse, tmp_path / "out", tiny["llama"], text)
    assert result["kl_after"] < 0.9 * result["kl_before"]


def test_evaluate_takes_the_adapter_as_its_source(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    run(EoRA(rank=8), rounded, tmp_path / "out", tiny["llama"], text)
    options = {"against": str(tiny["llama"]), "data": text["calibration"], "windows": 2, "sequence_length": 64}
    repaired = evaluate(str(tmp_path / "out"), EvaluateOptions(**options))
    beside = evaluate(str(rounded), EvaluateOptions(**options, adapter=str(tmp_path / "out")))
    alone = evaluate(str(rounded), EvaluateOptions(**options))
    assert repaired["kl"] == beside["kl"] < alone["kl"]


def test_a_repair_that_made_it_worse_is_written_and_named(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compresskit.compensation import walk

    factors = walk.low_rank_factors
    monkeypatch.setattr(walk, "low_rank_factors", lambda *given, **named: [1.6 * each for each in factors(*given, **named)])
    result = run(EoRA(rank=8), rounded, tmp_path / "out", tiny["llama"], text)
    assert (tmp_path / "out").is_dir()
    assert f"KL {result['kl_before']:.4g} -> {result['kl_after']:.4g}" in result["warning"]


@pytest.mark.slow
def test_the_same_command_gives_the_same_bytes_and_goes_on_after_a_kill(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = EoRA(rank_budget=0.2, adapter_bits=8)
    files = ("adapter_model.safetensors", "adapter_config.json")
    run(method, rounded, tmp_path / "once", tiny["llama"], text)
    finish = Writer.finish_block

    def killed(self: Writer, index: int, facts: dict[str, Any]) -> None:
        finish(self, index, facts)
        if index == 1:
            raise KeyboardInterrupt

    for merge in (False, True):
        once, twice = tmp_path / f"once-{merge}", tmp_path / f"twice-{merge}"
        run(method, rounded, once, tiny["llama"], text, merge=merge)
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "finish_block", killed)
            with pytest.raises(KeyboardInterrupt):
                run(method, rounded, twice, tiny["llama"], text, merge=merge)
        assert not twice.exists()
        run(method, rounded, twice, tiny["llama"], text, merge=merge, resume=True)
        for name in ("model.safetensors", "config.json") if merge else files:
            assert (once / name).read_bytes() == (twice / name).read_bytes(), name
    for name in files:
        assert (tmp_path / "once" / name).read_bytes() == (tmp_path / "once-False" / name).read_bytes()
