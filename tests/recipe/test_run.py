"""recipe/run.py: it does what has to be done, once, whatever stops it. End to end on tiny models."""

from __future__ import annotations

import gc
import importlib
import json
import random
import shutil
import signal
from pathlib import Path

import pytest
from recipe_runs import STEPS, TEXT, Make, weights
from tiny_models import make_model
from warm_processes import finish, start

from compresskit.errors import RequestError
from compresskit.recipe.reading import load
from compresskit.recipe.run import REPORT, Wanted, run


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
    monkeypatch.setattr("compresskit.recipe.work.restart_peak", lambda: mapped.append(mapped_below(tmp_path)))
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


def test_an_export_writes_one_file_that_counts_as_done_while_it_is_there(make: Make, tmp_path: Path) -> None:
    content = (
        "source: {source}\nsteps:\n  - prune: magnitude\n    calibration: {text}\n    round_to: 8\n    sequence_length: 64\n"
    )
    content += "    samples: 8\n  - export: gguf\n    weights: f16\n"
    content += "  - evaluate:\n    data: {text}\n    windows: 2\n    sequence_length: 64\n"
    recipe, file = load(make(content=content)), tmp_path / "out" / "export" / "export.gguf"
    result = run(recipe, tmp_path / "out")
    assert result["ran"] == ["prune", "export", "evaluate"]
    assert result["steps"]["export"]["output"] == str(file)
    assert result["steps"]["evaluate"]["source"] == str(tmp_path / "out" / "prune")
    before = file.read_bytes()
    assert run(recipe, tmp_path / "out")["ran"] == []
    file.unlink()
    assert run(recipe, tmp_path / "out")["ran"] == ["export"]
    assert file.read_bytes() == before
    assert run(recipe, tmp_path / "out", Wanted(first="export"))["ran"] == ["export", "evaluate"]


def test_overwriting_starts_anew_and_gives_the_same_bytes(done: Path, tmp_path: Path) -> None:
    before = weights(tmp_path / "out")
    assert run(load(done), tmp_path / "out", Wanted(overwrite=True))["ran"] == STEPS
    assert weights(tmp_path / "out") == before


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bytes_and_redoes_nothing(text_file: Path, tmp_path: Path) -> None:
    """Four kills, each of a process that runs: whenever a run gets to its end, it is compared, and the next begins anew."""
    source = make_model(tmp_path / "deep", "llama", num_hidden_layers=6, hidden_size=64, intermediate_size=256)
    path, log = tmp_path / "recipe.yaml", tmp_path / "log"
    path.write_text(TEXT.format(source=source, text=text_file, rank=2).replace("samples: 8", "samples: 32"))
    whole, out = tmp_path / "whole", tmp_path / "out"
    finish(["run", str(path), str(whole)], log)
    begun, ended = ((whole / name).stat().st_mtime for name in ("recipe.yaml", REPORT))  # without the imports before it
    moments = random.Random(0)
    done: dict[str, dict[str, object]] = {}
    killed = 0
    while killed < 4 or out.exists():
        process = start(["run", str(path), str(out)], log)
        process.join((ended - begun) * moments.uniform(0, 0.6) if killed < 4 else None)
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
