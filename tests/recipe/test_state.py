"""recipe/state.py: what a change makes anew, and what stays. End to end on tiny models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoint_damage import edit_tensors
from recipe_runs import STEPS, Make, weights

from compresskit.errors import RequestError
from compresskit.recipe.reading import load
from compresskit.recipe.run import REPORT, Wanted, run


def test_a_second_run_does_nothing_and_says_so(done: Path, tmp_path: Path, tiny: dict[str, Path]) -> None:
    first = json.loads((tmp_path / "out" / REPORT).read_text())
    said: list[str] = []
    os.utime(tiny["llama"] / "model.safetensors")
    second = run(load(done), tmp_path / "out", say=said.append)
    assert (second["ran"], second["skipped"]) == ([], STEPS)
    assert all("unchanged, skipped" in line for line in said)
    assert second["steps"] == first["steps"]


def test_a_changed_setting_redoes_its_step_and_what_follows(done: Path, tmp_path: Path) -> None:
    done.write_text(done.read_text().replace("rank: 2", "rank: 3"))
    assert run(load(done), tmp_path / "out")["ran"] == ["compensate", "evaluate"]


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


def test_a_changed_gate_redoes_nothing_and_judges_anew(done: Path, tmp_path: Path) -> None:
    done.write_text(done.read_text().replace("perplexity_ratio<=50", "perplexity_ratio<=0.01"))
    result = run(load(done), tmp_path / "out")
    assert (result["ran"], result["passed"]) == ([], False)


@pytest.mark.parametrize("name", ["../precious", "{absolute}", "..", "prune/../../precious", ""])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_state_that_names_a_folder_elsewhere_is_refused_and_nothing_is_removed(
    name: str, overwrite: bool, make: Make, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "photograph").touch()
    (tmp_path / "out" / "prune").mkdir(parents=True)
    steps = {"prune": {}, name.format(absolute=precious): {}}
    state = json.dumps({"format_version": 1, "steps": steps})
    (tmp_path / "out" / "run.json").write_text(state)
    with pytest.raises(RequestError, match=r"run\.json: names a step .* which is no name of one; restore the file"):
        run(load(make()), tmp_path / "out", Wanted(overwrite=overwrite))
    assert (precious / "photograph").is_file()
    assert (tmp_path / "out" / "prune").is_dir()
    assert (tmp_path / "out" / "run.json").read_text() == state


def test_a_damaged_output_is_made_again(done: Path, tmp_path: Path) -> None:
    before = weights(tmp_path / "out")
    edit_tensors(tmp_path / "out" / "quantize", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert run(load(done), tmp_path / "out")["ran"] == ["quantize"]
    assert weights(tmp_path / "out") == before


def test_a_folder_that_is_no_run_is_left_alone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(RequestError, match="is no run's folder"):
        run(load(make()), tmp_path / "out", Wanted(overwrite=True))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
