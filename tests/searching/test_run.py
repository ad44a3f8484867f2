"""searching/run.py: on tiny models, from the command line, interrupted, refused, planned, and as its own recipe. End to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import Run
from stock_tools import tokens, walked_logits
from transformers import AutoModelForCausalLM

from compresskit.api import run as run_recipe
from compresskit.checkpoint.recorded import read_manifest
from compresskit.models.load import open_model
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.rtn import RTN
from compresskit.recipe.plan import plan
from compresskit.recipe.reading import load
from compresskit.searching.options import SearchOptions
from compresskit.searching.request import SearchRequest
from compresskit.searching.results import recipe as recipe_of
from compresskit.searching.run import _missed, search

SMALL: dict[str, Any] = {
    "samples": 4, "sequence_length": 32, "levels": "3,8", "group_sizes": "8,16", "score_windows": 2, "verify_windows": 3,
    "passes": 60,
}  # fmt: skip


def options(text: Path, **more: Any) -> SearchOptions:
    return SearchOptions(calibration=str(text), **{**SMALL, **more})


def flags(text: Path) -> list[str]:
    return [f"--{key.replace('_', '-')}={value}" for key, value in {**SMALL, "calibration": text}.items()]


def test_a_search_writes_the_model_the_front_and_a_recipe_that_makes_it_again(
    run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, log = run(
        "search", tiny["llama"], out, "--bits", "4", "--method", "rtn", "--explain", "--json", *flags(text_file)
    )
    assert code == 0, log
    result, found = json.loads(said), json.loads((out / "search.json").read_text())
    assert len(found["random"]) == 64
    assert "64 random assignments of equal bytes" in log
    assert log.count("a MB is worth") == len(found["reasons"]) == len(found["chosen"]["units"]) == 12
    assert result["bytes_after"] == open_model(out).bytes <= found["chosen"]["bytes"]
    model = open_model(tiny["llama"])
    weights = sum(math.prod(model.linear_shape(name)) for name in model.linears)
    as_many = 4 * weights / 8 + 2 * weights / 32 + 16 * len(model.linears)  # `--bits 4`, in its default groups of 32
    assert sum(spec.bytes for spec in open_model(out).checkpoint.tensors.values() if ".weight_" in spec.name) <= as_many
    # Measured in memory, and again from the folder.
    assert result["kl_held_back"] > 0
    recorded = read_manifest(out)
    assert recorded is not None
    assert recorded["stage"] == "search"
    assert recorded["facts"]["chosen"]["units"] == found["chosen"]["units"]
    stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.allclose(stock(tokens()).logits, walked_logits(out), atol=1e-4)
    recipe = out / "recipe.yaml"
    planned = plan(load(recipe, {}), probe=False)["steps"][0]
    assert planned["bytes"] == result["bytes_after"]
    text = recipe.read_text().replace("  - evaluate:\n    against: source\n    data: builtin\n", "")
    (tmp_path / "again.yaml").write_text(text)
    run_recipe(tmp_path / "again.yaml", tmp_path / "again")
    made = next((tmp_path / "again").glob("*/model.safetensors"))
    assert made.read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_interrupted_search_ends_as_an_unbroken_one(
    tiny: dict[str, Path], text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compresskit.searching import trials

    source, asked = str(tiny["llama"]), options(text_file, max_loss=0.003, run=False)
    search(source, tmp_path / "whole", asked)
    divergences, calls = trials.divergences, [0]

    def stopping(*given: Any) -> list[list[float]]:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return divergences(*given)

    monkeypatch.setattr(trials, "divergences", stopping)
    with pytest.raises(KeyboardInterrupt):
        search(source, tmp_path / "stopped", asked)
    scored = (tmp_path / "stopped.partial" / "training" / "costs.json").stat().st_mtime_ns
    monkeypatch.setattr(trials, "divergences", divergences)
    with pytest.raises(Exception, match="left by a run with other inputs or settings"):
        search(source, tmp_path / "stopped", asked.model_copy(update={"resume": True, "max_loss": 0.004}))
    assert (tmp_path / "stopped.partial" / "training" / "costs.json").stat().st_mtime_ns == scored
    search(source, tmp_path / "stopped", asked.model_copy(update={"resume": True}))
    for name in ("search.json", "recipe.yaml"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    assert not list((tmp_path / "whole").glob("*.safetensors"))
    assert not (tmp_path / "stopped.partial").exists()
    found = json.loads((tmp_path / "whole" / "search.json").read_text())
    assert found["chosen"]["kl"] <= 0.003


@pytest.mark.parametrize(
    ("most", "found", "says"), [(0.1, 0.109, False), (0.1, 0.111, True), (None, 9.0, False), (0.1, None, False)]
)
def test_a_largest_loss_that_held_back_text_does_not_confirm_is_said(most: float, found: float, says: bool) -> None:
    assert bool(_missed(most, found)) == says


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "no target: give one of --bytes"),
        (["--bits", "4", "--bytes", "0.5"], "--bytes --bits: give one of"),
        (["--bits", "9"], "--bits 9"),
        (["--bytes", "0.01"], "the smallest choice takes"),
        (["--bytes", "much"], "--bytes much: neither a share"),
        (["--bits", "2"], "the smallest choice takes"),
        (["--bits", "3", "--levels", "2,9"], "'9' is no whole number from 2 to 8"),
        (["--bits", "3", "--levels", "3", "--group-sizes", "8"], "nothing to search"),
        (["--bits", "8", "--levels", "8"], "--levels 8 --group-sizes 8,16: leave one choice"),
        (["--max-loss", "0"], "--max-loss 0"),
        (["--max-loss", "1e-9"], "no choice of --levels 3,8 comes so close"),
        (["--bits", "3", "--method", "nf4"], "--quantizer nf4"),
    ],
)
def test_what_cannot_be_searched_is_one_line_and_exit_code_2(
    given: list[str], said: str, run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    code, _, log = run("search", tiny["llama"], tmp_path / "out", *flags(text_file), "--quiet", *given)
    assert (code, log.count("\n")) == (2, 1), log
    assert said in log
    assert not (tmp_path / "out").exists()


def test_the_recipe_keeps_what_decides_the_weights_and_finds_its_files_from_every_folder(
    tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a+b.txt", "c.jsonl"):
        Path(name).write_text("")
    asked = SearchOptions(calibration="a+b.txt+builtin+c.jsonl#said", bits=4, dtype="bfloat16", levels="2,3")
    request = SearchRequest(None, open_model(tiny["llama"]), tmp_path / "out", asked, str(tiny["llama"]))
    step = yaml.safe_load(recipe_of(request, request.smallest))["steps"][0]
    assert step["calibration"] == f"{tmp_path / 'a+b.txt'}+builtin+{tmp_path / 'c.jsonl'}#said"
    assert step["dtype"] == "bfloat16"
    assert "trust_remote_code" not in step


def test_as_many_bytes_as_quantize_writes(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = open_model(tiny["llama"])
    budgets: list[int] = []
    for bits in (3, 3.5, 4):
        request = SearchRequest(None, model, tmp_path / "out", SearchOptions(bits=bits))
        assert request.budget is not None
        budgets.append(request.budget)
        stored = QuantizeRequest(RTN(bits=bits, symmetric=True), model, tmp_path / "out", request.options)
        if bits == int(bits):
            assert request.budget == sum(spec.bytes for name in stored.schemes for spec in stored.linear_tensors(name))
    assert budgets[1] == (budgets[0] + budgets[2]) // 2


def test_experts_are_refused(run: Run, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    code, _, log = run("search", tiny["mixtral"], tmp_path / "out", "--bits", "4", *flags(text_file))
    assert code == 2
    assert "one bit width" in log


def test_a_plan_says_passes_memory_and_bytes(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    settings = "".join(f"    {key}: {json.dumps(value)}\n" for key, value in {**SMALL, "calibration": str(text_file)}.items())
    recipe.write_text(f"source: {tiny['llama']}\nsteps:\n  - search:\n    bytes: 0.9\n{settings}")
    row = plan(load(recipe, {}))["steps"][0]
    assert 0.85 <= row["bytes"] / (2 * open_model(tiny["llama"]).parameters) <= 0.9
    assert row["seconds"] > 0
    assert row["peak_memory_bytes"] > 0
    assert row["scratch_bytes"] > 0
