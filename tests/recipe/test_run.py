"""A run does what has to be done, once, and whatever stops it. End to end on tiny models."""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
from checkpoint_damage import edit_tensors
from markdown_it import MarkdownIt
from tiny_models import make_model
from warm_processes import start

from compresskit.checkpoint.reader import sha256
from compresskit.cli.main import main
from compresskit.errors import RequestError
from compresskit.recipe import verdict
from compresskit.recipe.reading import load
from compresskit.recipe.run import REPORT, Wanted, run

TEXT = """
source: {source}
defaults: {{calibration: {text}, samples: 8, sequence_length: 64}}
steps:
  - {{prune: cfsp, sparsity: 0.25, round_to: 8}}
  - {{quantize: rtn, bits: 4, group_size: 8}}
  - {{compensate: eora, original: prune, rank: {rank}}}
  - {{evaluate: , against: source, data: {text}, windows: 2}}
gates: [size_ratio<=1, perplexity_ratio<=50]
"""
STEPS = ["prune", "quantize", "compensate", "evaluate"]
Make = Callable[..., Path]


@pytest.fixture
def make(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> Make:
    """Write the recipe, over a copy of the tiny llama that a test may change."""
    source = tmp_path / "model"
    shutil.copytree(tiny["llama"], source)

    def write(rank: int = 2, content: str = TEXT) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content.format(source=source, text=text_file, rank=rank))
        return path

    return write


def weights(out: Path) -> dict[str, str]:
    return {str(path.relative_to(out)): sha256(path) for path in sorted(out.rglob("*.safetensors"))}


def test_a_run_writes_a_folder_a_step_and_judges_it(make: Make, tmp_path: Path) -> None:
    result = run(load(make()), tmp_path / "out")
    assert result["ran"] == STEPS
    assert result["passed"]
    assert [gate["step"] for gate in result["gates"]] == ["evaluate", "evaluate"]
    assert {path.parent.name for path in (tmp_path / "out").rglob("*.safetensors")} == set(STEPS[:3])
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == result
    assert (tmp_path / "out" / "recipe.yaml").read_text() == make().read_text()


def test_a_step_starts_without_what_the_one_before_it_held(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fine-tuning leaves reference cycles, which keep the source's weights mapped until Python happens to collect them."""
    importlib.import_module("bitsandbytes")  # peft's first import of it logs an error, whose frames pytest keeps
    rows = [{"prompt": f"Say {i}", "response": f"{i} and {i + 1} and {i * i}"} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    steps = f"[{{recover: full, original: source, data: {tmp_path}/rows.jsonl, steps: 2, rank: 2}}, {{evaluate: }}]"
    content = "source: {source}\ndefaults: {{data: {text}, windows: 2, sequence_length: 256, calibration: {text}}}\nsteps: "
    recipe = load(make(content=content + steps.replace("{", "{{").replace("}", "}}")))
    mapped: list[list[str]] = []
    monkeypatch.setattr("compresskit.recipe.run.restart_peak", lambda: mapped.append(mapped_below(tmp_path)))
    gc.disable()
    try:
        run(recipe, tmp_path / "out")
    finally:
        gc.enable()
    assert mapped == [[], []]


def mapped_below(folder: Path) -> list[str]:
    """Files in the folder that this process has mapped into its memory; none are seen where there is no /proc."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return sorted({line.split()[-1] for line in lines if str(folder) in line})


def test_a_second_run_does_nothing_and_says_so(make: Make, tmp_path: Path) -> None:
    first = run(load(make()), tmp_path / "out")
    said: list[str] = []
    os.utime(tmp_path / "model" / "model.safetensors")
    second = run(load(make()), tmp_path / "out", say=said.append)
    assert (second["ran"], second["skipped"]) == ([], STEPS)
    assert all("unchanged, skipped" in line for line in said)
    assert second["steps"] == first["steps"]


def test_a_changed_setting_redoes_its_step_and_what_follows(make: Make, tmp_path: Path) -> None:
    run(load(make(rank=2)), tmp_path / "out")
    assert run(load(make(rank=3)), tmp_path / "out")["ran"] == ["compensate", "evaluate"]


def test_a_changed_byte_of_the_source_redoes_everything(make: Make, tmp_path: Path) -> None:
    run(load(make()), tmp_path / "out")
    edit_tensors(tmp_path / "model", lambda tensors: tensors["model.norm.weight"][:1].add_(0.001))
    assert run(load(make()), tmp_path / "out")["ran"] == STEPS


def test_a_changed_text_redoes_the_steps_that_read_it(make: Make, tmp_path: Path, text_file: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text(text_file.read_text())
    path = make()
    path.write_text(path.read_text().replace(f"data: {text_file}", f"data: {own}"))
    run(load(path), tmp_path / "out")
    own.write_text(text_file.read_text()[1:])
    assert run(load(path), tmp_path / "out")["ran"] == ["evaluate"]


def test_a_changed_gate_redoes_nothing_and_judges_anew(make: Make, tmp_path: Path) -> None:
    run(load(make()), tmp_path / "out")
    path = make()
    path.write_text(path.read_text().replace("perplexity_ratio<=50", "perplexity_ratio<=0.01"))
    result = run(load(path), tmp_path / "out")
    assert (result["ran"], result["passed"]) == ([], False)


def test_a_damaged_output_is_made_again(make: Make, tmp_path: Path) -> None:
    run(load(make()), tmp_path / "out")
    before = weights(tmp_path / "out")
    edit_tensors(tmp_path / "out" / "quantize", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert run(load(make()), tmp_path / "out")["ran"] == ["quantize"]
    assert weights(tmp_path / "out") == before


def test_a_step_can_be_asked_for(make: Make, tmp_path: Path) -> None:
    recipe = load(make())
    with pytest.raises(RequestError, match="reads step 'prune', which is not done"):
        run(recipe, tmp_path / "out", Wanted(only="quantize"))
    assert run(recipe, tmp_path / "out", Wanted(only="prune"))["ran"] == ["prune"]
    assert run(recipe, tmp_path / "out", Wanted(first="quantize"))["ran"] == STEPS[1:]
    assert run(recipe, tmp_path / "out", Wanted(only="evaluate"))["ran"] == ["evaluate"]
    with pytest.raises(RequestError, match="no step 'qantize'; Did you mean 'quantize'"):
        run(recipe, tmp_path / "out", Wanted(first="qantize"))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(make: Make, tmp_path: Path) -> None:
    said: list[str] = []
    result = run(load(make()), tmp_path / "out", Wanted(dry_run=True), said.append)
    assert list(result["todo"]) == STEPS
    assert not (tmp_path / "out").exists()
    assert said[0] == "prune: would run prune cfsp (not run yet)"


def test_a_folder_that_is_no_run_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match="is no run's folder"):
        run(load(make()), tmp_path / "out", Wanted(overwrite=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_overwriting_starts_anew_and_gives_the_same_bytes(make: Make, tmp_path: Path) -> None:
    run(load(make()), tmp_path / "out")
    before = weights(tmp_path / "out")
    assert run(load(make()), tmp_path / "out", Wanted(overwrite=True))["ran"] == STEPS
    assert weights(tmp_path / "out") == before


def test_gates_decide_the_exit_code_and_ci_reads_them(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(verdict.SUMMARY_VARIABLE, str(tmp_path / "summary.md"))
    path = make()
    out, xml = str(tmp_path / "out"), tmp_path / "junit.xml"
    for limit, code in (("50", 0), ("0.01", 3)):
        path.write_text(make().read_text().replace("perplexity_ratio<=50", f"perplexity_ratio<={limit}"))
        with pytest.raises(SystemExit) as caught:
            main(["run", str(path), out, "--junit", str(xml), "--json"])
        assert (caught.value.code or 0) == code
    output = capsys.readouterr()
    assert "evaluate: perplexity_ratio<=0.01, found" in output.err
    assert "MISSED" in output.err
    suite = ElementTree.parse(xml).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")
    assert "missed by" in suite.findall(".//failure")[0].get("message", "")
    html = MarkdownIt().enable("table").render((tmp_path / "summary.md").read_text())
    assert html.count("<table>") == 4
    assert '<td style="text-align:right">MISSED</td>' in html


def test_a_run_killed_at_any_moment_ends_with_the_same_bytes_and_redoes_nothing(text_file: Path, tmp_path: Path) -> None:
    """Twenty kills, each of a process that runs: whenever a run gets to its end, it is compared, and the next begins anew."""
    source = make_model(tmp_path / "deep", "llama", num_hidden_layers=6, hidden_size=64, intermediate_size=256)
    path, log = tmp_path / "recipe.yaml", tmp_path / "log"
    path.write_text(TEXT.format(source=source, text=text_file, rank=2).replace("samples: 8", "samples: 32"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    process = start(["run", str(path), str(whole)], log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    begun, ended = ((whole / name).stat().st_mtime for name in ("recipe.yaml", REPORT))  # without the imports before it
    moments = random.Random(0)
    done: dict[str, dict[str, object]] = {}
    killed = 0
    while killed < 20 or out.exists():
        process = start(["run", str(path), str(out)], log)
        process.join((ended - begun) * moments.uniform(0, 0.6) if killed < 20 else None)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), log.read_text()
        killed += process.exitcode != 0
        steps = json.loads((out / "run.json").read_text())["steps"] if (out / "run.json").exists() else {}
        assert all(steps[name] == step for name, step in done.items()), "a step that was done ran again"
        done = {name: step for name, step in steps.items() if step["status"] == "done"}
        if (out / REPORT).exists():
            assert weights(out) == weights(whole)
            shutil.rmtree(out)
            done = {}
