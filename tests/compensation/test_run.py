"""`compensate` end to end: stock tools load what it writes, bad pairs are refused, interrupted runs go on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stock_tools import stock_logits, walked_logits
from tiny_models import make_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from compresskit.checkpoint.reader import tensors_in
from compresskit.checkpoint.stock import load_whole
from compresskit.checkpoint.writer import Writer
from compresskit.compensation.act import Act
from compresskit.compensation.corda import CorDA
from compresskit.compensation.eora import EoRA
from compresskit.compensation.method import CompensateMethod
from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate
from compresskit.compensation.svd import SVD
from compresskit.errors import CompresskitError, RequestError, UnsupportedArchitecture
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.formats.peft import WEIGHTS
from compresskit.methods import STAGES
from compresskit.models.load import open_any, open_model
from compresskit.models.meta import read_plain
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune
from compresskit.quantization.apiq.method import ApiQ
from compresskit.quantization.nf4 import NF4
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize
from compresskit.stages import Options


@pytest.fixture(scope="module")
def text(text_file: Path) -> dict[str, Any]:
    return {"calibration": str(text_file), "samples": 6, "sequence_length": 64}


@pytest.fixture(scope="module")
def rounded(tiny: dict[str, Path], text: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama in 2 bits, rounded to nearest."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    quantize(RTN(bits=2, group_size=16), str(tiny["llama"]), out, Options(**text))
    return out


def run(method: CompensateMethod, source: Path, out: Path, original: Path, text: dict[str, Any], **more: Any) -> dict[str, Any]:
    return compensate(method, str(source), out, CompensateOptions(original=str(original), **{**text, **more}))


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


def test_full_rank_restores_the_original(tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path) -> None:
    run(EoRA(rank=16), rounded, tmp_path / "out", tiny["llama"], text)
    model, original = open_any(str(tmp_path / "out")), open_model(tiny["llama"])
    for name in model.linears:
        if min(model.linear_shape(name)) == 16:
            restored, wanted = (read_plain(each, f"{name}.weight").float() for each in (model, original))
            assert torch.allclose(restored, wanted, atol=2e-3), name


def test_every_kind_of_family_is_repaired(tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    folders = []
    for family in ("qwen2", "gemma2", "phi3", "opt", "gpt_neox", "mixtral", "qwen2_moe", "gpt2"):
        experts = family in ("mixtral", "qwen2_moe")
        merge, folder = experts or family == "gpt2", tmp_path / family
        method = NF4() if family == "gpt2" else RTN(bits=2, group_size=16, symmetric=experts)
        quantize(method, str(tiny[family]), folder, Options(**text))
        folders.append(tmp_path / f"{family}-repaired")
        result = run(EoRA(rank=8), folder, folders[-1], tiny[family], text, merge=merge)
        assert result["kl_after"] < result["kl_before"], family
        if merge:
            with pytest.raises(UnsupportedArchitecture, match="--merge"):
                run(EoRA(rank=8), folder, tmp_path / "no", tiny[family], text)
    for folder, logits in zip(folders, stock_logits(folders, tmp_path), strict=True):
        assert (logits - walked_logits(folder)).abs().max() < 1e-3, folder.name


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


def test_an_8_bit_checkpoint_of_bitsandbytes_is_read(tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    network = AutoModelForCausalLM.from_pretrained(
        tiny["llama"], quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    network.save_pretrained(tmp_path / "int8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny["llama"] / name, tmp_path / "int8" / name)
    model, original = open_model(tmp_path / "int8"), open_model(tiny["llama"])
    for name in model.linears:
        found, wanted = (read_plain(each, f"{name}.weight") for each in (model, original))
        assert (found - wanted).abs().max() <= wanted.abs().max() / 127, name
    result = run(EoRA(rank=4), tmp_path / "int8", tmp_path / "out", tiny["llama"], text)
    assert result["kl_after"] < result["kl_before"]


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


def test_corda_splits_the_weights_and_changes_nothing(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    folders = [tmp_path / mode for mode in ("instruction", "knowledge")]
    for folder in folders:
        result = run(CorDA(rank=4, mode=folder.name), rounded, folder, tiny["llama"], text)  # type: ignore[arg-type]
        assert abs(result["kl_after"] / result["kl_before"] - 1) < 1e-3
    found = stock_logits(folders, tmp_path)
    for folder, logits in zip(folders, found, strict=True):
        assert (logits - walked_logits(folder)).abs().max() < 1e-3
        assert (logits - walked_logits(rounded)).abs().max() < 1e-2
    large, small = (open_any(str(folder)).adapter for folder in folders)
    assert large is not None and small is not None
    assert all(large.update(name).norm() > small.update(name).norm() for name in large.names)
    with pytest.raises(RequestError, match="--merge"):
        run(CorDA(rank=4), rounded, tmp_path / "no", tiny["llama"], text, merge=True)


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


def test_equal_models_have_nothing_to_compensate(tiny: dict[str, Path], text: dict[str, Any], tmp_path: Path) -> None:
    result = run(EoRA(rank=4), tiny["llama"], tmp_path / "out", tiny["llama"], text)
    assert "nothing to compensate" in result["note"]
    assert result["output"] == str(tiny["llama"])
    assert not (tmp_path / "out").exists()


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


def test_bad_requests_are_refused_before_any_work(
    tiny: dict[str, Path], rounded: Path, text: dict[str, Any], tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    network = load_whole(tiny["llama"], torch.float32)
    network.resize_token_embeddings(300)
    network.save_pretrained(larger)
    wider = make_model(tmp_path / "wider", "llama", intermediate_size=128)
    renamed = make_model(tmp_path / "renamed", "llama")
    tokenizer = json.loads((renamed / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["extra"] = 258
    (renamed / "tokenizer.json").write_text(json.dumps(tokenizer))
    run(EoRA(rank=4), rounded, tmp_path / "adapter", tiny["llama"], text)
    cases: list[tuple[str, CompensateMethod, Path, Path]] = [
        ("vocabulary", EoRA(), rounded, larger),
        ("family", EoRA(), rounded, tiny["opt"]),
        ("tokenizer", EoRA(), rounded, renamed),
        ("prunings", EoRA(), rounded, wider),
        ("is an adapter", EoRA(), tmp_path / "adapter", tiny["llama"]),
        ("exceeds 16", EoRA(rank=17), rounded, tiny["llama"]),
        ("less than one pair", EoRA(rank_budget=1e-4), rounded, tiny["llama"]),
        ("leaves nothing", EoRA(ignore=("model",)), rounded, tiny["llama"]),
    ]
    for message, method, source, original in cases:
        with pytest.raises(CompresskitError, match=message) as caught:
            run(method, source, tmp_path / "out", original, text)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))
    with pytest.raises(RequestError, match="pass one of them"):
        EoRA(rank=4, rank_budget=0.1)
    assert "compensate" in STAGES
