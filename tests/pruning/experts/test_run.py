"""pruning/experts/run.py and pruning/experts/walk.py: what the stock network, edited by hand, gives, also when resumed. Oracle.

End to end on tiny models; the stages after it work, or refuse by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Run
from expert_networks import edited, expert_blocks, logits_of, stock
from families import build
from family_stages import write_tokenizer
from safetensors.torch import load_file
from small_runs import options, slow_but, stopped_after_two_blocks
from tiny_models import make_model

from compresskit.checkpoint.reader import sha256
from compresskit.compensation.eora import EoRA
from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate
from compresskit.errors import RequestError
from compresskit.methods import METHODS, STAGES, method_class
from compresskit.models.load import open_model
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.experts.method import ExpertsMethod
from compresskit.pruning.experts.ream import REAM
from compresskit.pruning.experts.reap import REAP
from compresskit.pruning.experts.request import open_request
from compresskit.pruning.experts.run import remove_experts
from compresskit.pruning.run import prune
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize

METHODS_OF_EXPERTS = [name for name in METHODS["prune"] if "experts" in STAGES.get(f"prune {name}", STAGES["prune"]).run]
FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "granitemoe", "ernie4_5_moe")

pytestmark = pytest.mark.usefixtures("own_structures")


def made(model_type: str, folder: Path) -> Path:
    build(model_type, folder)
    write_tokenizer(folder)
    return folder


def facts_of(out: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((out / "compresskit.json").read_text())["facts"]["blocks"]
    return found


@pytest.mark.parametrize("model_type", slow_but("qwen2_moe", of=FAMILIES))
def test_stock_transformers_loads_what_it_is_edited_to_by_hand(model_type: str, text_file: Path, tmp_path: Path) -> None:
    source = made(model_type, tmp_path / "source")
    for refit in (False, True):
        out = tmp_path / f"out-{refit}"
        remove_experts(REAP(experts=3, refit=refit), str(source), out, options(text_file))
        kept = {i: facts["kept_experts"] for i, facts in enumerate(facts_of(out)) if facts}
        assert sorted(kept) == expert_blocks(source) and all(len(each) == 3 for each in kept.values())
        downs = load_file(out / "model.safetensors") if refit else {}
        expected = edited(source, out, kept, downs)
        assert torch.allclose(logits_of(stock(out)), logits_of(expected), atol=1e-5)
        if refit:
            errors = [(facts["error_before"], facts["error_after"]) for facts in facts_of(out) if facts]
            assert all(after < before for before, after in errors)


@pytest.mark.parametrize("method", METHODS_OF_EXPERTS)
def test_all_experts_are_the_source(method: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    remove_experts(method_class("prune", method)(experts=4), str(tiny["qwen3_moe"]), tmp_path / "out", options(text_file, 2))
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny["qwen3_moe"], tmp_path / "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("refit", [True, False])
def test_an_expert_that_no_token_chose_goes_without_a_trace(refit: bool, text_file: Path, tmp_path: Path) -> None:
    """Its router row is the mean of the others', never the largest; the chosen one's weight is normalised to 1."""
    source = make_model(tmp_path / "source", "qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True)
    network = stock(source)
    for block in network.model.layers:
        block.mlp.gate.weight.data[2] = block.mlp.gate.weight.data[[0, 1, 3]].mean(dim=0)
    network.save_pretrained(source)
    expected = logits_of(network)
    remove_experts(REAP(experts=3, refit=refit), str(source), tmp_path / "out", options(text_file))
    assert [facts["kept_experts"] for facts in facts_of(tmp_path / "out")] == [[0, 1, 3]] * 3
    assert torch.equal(logits_of(stock(tmp_path / "out")), expected)


@pytest.mark.parametrize("method", [REAP(experts=2, refit=False), REAP(experts=2), REAM(experts=3)])
def test_an_interrupted_run_resumes_to_the_same_bytes(
    method: ExpertsMethod, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    source = str(tiny["qwen3_moe"])
    remove_experts(method, source, whole, options(text_file))
    stopped_after_two_blocks(lambda: remove_experts(method, source, out, options(text_file)))
    assert not out.exists()
    remove_experts(method, source, out, options(text_file).model_copy(update={"resume": True}))
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")
    assert facts_of(out) == facts_of(whole)


def test_the_plan_is_exact_and_bfloat16_stays(text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "half", "mixtral", dtype=torch.bfloat16)
    asked = options(text_file)
    request = open_request(REAP(experts=2), str(source), tmp_path / "out", asked)
    remove_experts(request.method, str(source), tmp_path / "out", asked)
    file = tmp_path / "out" / "model.safetensors"
    assert request.outputs().bytes(asked.shard_bytes) == file.stat().st_size
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert request.result_model().parameters == open_model(tmp_path / "out").parameters


def test_the_command_writes_a_plain_checkpoint_that_every_later_stage_takes(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    source, out, narrow = tiny["qwen2_moe"], tmp_path / "out", tmp_path / "narrow"
    code, said, _ = run("prune", "reap", source, out, "--calibration", text_file, *SMALL, "--sparsity", 0.5, "--json")
    result = json.loads(said)
    assert code in (0, 3) and (result["experts_removed"], result["experts_kept"]) == (2, 2)
    before, config = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert config == before | {next(key for key in ("num_experts", "num_local_experts") if key in before): 2}
    report = run("evaluate", out, "--against", source, "--data", text_file, "--windows", 2, "--sequence-length", 64, "--json")
    assert json.loads(report[1])["kl"] > 0
    prune(CFSP(sparsity=0.3, round_to=8, allocation="uniform"), str(out), narrow, options(text_file, 2))
    quantize(RTN(bits=4, group_size=8), str(out), tmp_path / "low", options(text_file, 2))
    against = options(text_file, 2).model_dump() | {"original": str(source)}
    with pytest.raises(RequestError, match=r"`prune reap` took experts out of .*recover --loss distill"):
        compensate(EoRA(rank=2), str(tmp_path / "low"), tmp_path / "fix", CompensateOptions(**against))
    compensate(
        EoRA(rank=2),
        str(tmp_path / "low"),
        tmp_path / "fix",
        CompensateOptions(**against | {"original": str(out), "merge": True}),
    )
