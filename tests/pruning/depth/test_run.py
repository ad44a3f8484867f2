"""pruning/depth/run.py: what is written is what the stock networks' own activations ask for (oracle), also after an interruption.

End to end on tiny models; the stages after it work, or refuse by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, Run
from safetensors.torch import load_file
from small_runs import options, slow_but, stopped_after_two_blocks
from tiny_models import make_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from compresskit import calibration
from compresskit.checkpoint.reader import sha256
from compresskit.compensation.eora import EoRA
from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate
from compresskit.errors import RequestError
from compresskit.job import HELD_BACK
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.models.pair import pair
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.depth import run as depth_run
from compresskit.pruning.depth.choice import Chosen
from compresskit.pruning.depth.method import Depth
from compresskit.pruning.depth.request import open_request
from compresskit.pruning.depth.run import remove
from compresskit.pruning.run import prune
from compresskit.quantization.rtn import RTN
from compresskit.quantization.run import quantize

BLOCKS, RIDGE = 7, 0.01
DOWN = "model.layers.{}.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("deep") / "model", "llama", num_hidden_layers=BLOCKS)


def chosen(monkeypatch: pytest.MonkeyPatch, removed: list[int]) -> None:
    monkeypatch.setattr(depth_run, "_chosen", lambda request, job: Chosen(removed, {}))


class Seen:
    """A stock network's hidden states before each block and after the last, and the inputs of each down projection."""

    def __init__(self, folder: Path, tokens: Tensor):
        network = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.states: list[Tensor] = []
        self.inputs: list[Tensor] = []
        for block in network.model.layers:
            block.register_forward_pre_hook(lambda _, given: self.states.append(given[0].double().flatten(0, 1)))
            block.mlp.down_proj.register_forward_pre_hook(lambda _, given: self.inputs.append(given[0].double().flatten(0, 1)))
        network.model.layers[-1].register_forward_hook(lambda _, __, given: self.states.append(given.double().flatten(0, 1)))
        with torch.no_grad():
            network(input_ids=tokens, use_cache=False)


@pytest.mark.parametrize(("refit", "removed"), [("all", [2, 4, 5]), ("all", [0, 1, 6]), ("gaps", [2, 4, 5]), ("none", [1, 2, 6])])
def test_refitted_weights_bring_the_stock_networks_hidden_states_back(
    refit: Any, removed: list[int], deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, by an augmented regression on what two stock networks compute; other tensors are the source's bytes."""
    chosen(monkeypatch, removed)
    method, out = Depth(blocks=3, refit=refit, ridge=RIDGE), tmp_path / "out"
    remove(method, str(deep), out, options(text_file))
    request = open_request(method, str(deep), tmp_path / "again", options(text_file))
    where = Where(torch.device("cpu"), torch.float32)
    tokens = calibration.calibrate(request.text, request.model, where, lambda *_: None).tokens[:-HELD_BACK]
    before, after = load_file(deep / "model.safetensors"), load_file(out / "model.safetensors")
    original, pruned = Seen(deep, tokens), Seen(out, tokens)
    kept = [index for index in range(BLOCKS) if index not in removed]
    for new, old in enumerate(kept):
        for name in [name for name in before if name.startswith(f"model.layers.{old}.") and name != DOWN.format(old)]:
            assert torch.equal(after[name.replace(f".{old}.", f".{new}.", 1)], before[name])
        goal = kept[new + 1] if new + 1 < len(kept) else BLOCKS
        is_refitted = {"all": goal > old + 1 or old > removed[0], "gaps": goal > old + 1, "none": False}[refit]
        weight, found = before[DOWN.format(old)].double(), after[DOWN.format(new)].double()
        if not is_refitted:
            assert torch.equal(found, weight)
            continue
        inputs = pruned.inputs[new]
        others = pruned.states[new + 1] - inputs @ found.T
        eps = RIDGE * float(inputs.square().sum(dim=0).mean())
        rows = torch.cat([inputs, eps**0.5 * torch.eye(inputs.shape[1], dtype=torch.float64)])
        expected = torch.linalg.lstsq(rows, torch.cat([original.states[goal] - others, eps**0.5 * weight.T])).solution.T
        assert torch.allclose(found, expected, atol=2e-4), (old, float((found - expected).abs().max()))
        assert (found - weight).abs().max() > 0.01


@pytest.mark.parametrize("refit", slow_but("all", of=("all", "gaps")))
def test_an_interrupted_run_resumes_to_the_same_bytes(
    refit: Any, deep: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped when the second refitted block is on disk; the choice is then not made again."""
    method, whole, out = Depth(blocks=3, choose="angle", refit=refit), tmp_path / "whole", tmp_path / "out"
    chosen(monkeypatch, [1, 3, 5])
    remove(method, str(deep), whole, options(text_file))
    stopped_after_two_blocks(lambda: remove(method, str(deep), out, options(text_file)))
    assert not out.exists()
    monkeypatch.delattr(depth_run, "_chosen")
    resumed = options(text_file).model_copy(update={"resume": True})
    remove(method, str(deep), out, resumed)
    assert sha256(out / "model.safetensors") == sha256(whole / "model.safetensors")
    first, second = (json.loads((folder / "compresskit.json").read_text())["facts"] for folder in (out, whole))
    assert first == second


def test_the_command_writes_a_plain_checkpoint_that_every_later_stage_takes_or_refuses_by_name(
    run: Run, deep: Path, text_file: Path, tmp_path: Path
) -> None:
    out, low, fix, narrow = (tmp_path / name for name in ("out", "low", "fix", "narrow"))
    code, said, _ = run("prune", "depth", deep, out, "--calibration", text_file, *SMALL, "--sparsity", 0.3, "--json")
    result = json.loads(said)
    assert code in (0, 3)  # a random model without two blocks hardly agrees with itself
    assert result["blocks_removed"] == 2 and result["blocks_kept"] == BLOCKS - 2
    config = json.loads((out / "config.json").read_text())
    assert config == json.loads((deep / "config.json").read_text()) | {"num_hidden_layers": BLOCKS - 2}
    assert result["parameters_after"] == AutoModelForCausalLM.from_pretrained(out).num_parameters()
    assert json.loads(run("inspect", out, "--json")[1])["blocks"] == BLOCKS - 2
    report = run("evaluate", out, "--against", deep, "--data", text_file, "--windows", 2, "--sequence-length", 64, "--json")
    assert json.loads(report[1])["kl"] > 0

    quantize(RTN(bits=4, group_size=8), str(out), low, options(text_file))
    against = CompensateOptions(**options(text_file).model_dump(), original=str(deep))
    with pytest.raises(RequestError, match=r"`prune depth` took blocks out of the 7 of .*recover --loss distill"):
        compensate(EoRA(rank=2), str(low), fix, against)
    assert pair(open_model(low), open_model(out)).kept == {}
    prune(CFSP(sparsity=0.3, round_to=8), str(out), narrow, options(text_file))
    quantize(RTN(bits=4, group_size=8), str(narrow), tmp_path / "narrow-low", options(text_file))
    assert pair(open_model(tmp_path / "narrow-low"), open_model(out)).kept != {}


def test_a_ragged_model_loses_blocks_and_stays_ragged(deep: Path, text_file: Path, tmp_path: Path) -> None:
    narrow, out = tmp_path / "narrow", tmp_path / "out"
    prune(CFSP(sparsity=0.3, round_to=8), str(deep), narrow, options(text_file))
    removed = remove(Depth(blocks=2, choose="run"), str(narrow), out, options(text_file))["removed_blocks"]
    before, after = (json.loads((folder / "config.json").read_text())["block_configs"] for folder in (narrow, out))
    assert after == [each for index, each in enumerate(before) if index not in removed]
    network = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert len(network.model.layers) == BLOCKS - 2


def test_a_bfloat16_model_stays_one(text_file: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "half", "qwen3", dtype=torch.bfloat16)
    remove(Depth(blocks=1, choose="angle"), str(source), tmp_path / "out", options(text_file))
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_recover_takes_a_model_with_fewer_blocks(deep: Path, text_file: Path, tmp_path: Path) -> None:
    """Its request compares logits alone; the fine-tuning is tested with it."""
    pytest.importorskip("peft")
    from compresskit.recovery.options import RecoverOptions
    from compresskit.recovery.request import open_request as recovery_of
    from compresskit.recovery.selection.random import Random

    out, data = tmp_path / "out", tmp_path / "data.jsonl"
    remove(Depth(blocks=2, choose="angle"), str(deep), out, options(text_file))
    data.write_text('{"instruction": "the quick", "output": "brown fox"}\n' * 9)
    asked = RecoverOptions(original=str(deep), data=(str(data),), loss="distill", sequence_length=64)
    request = recovery_of(Random(), str(out), tmp_path / "recovered", asked)
    assert request.model.block_count == BLOCKS - 2 and request.original is not None
