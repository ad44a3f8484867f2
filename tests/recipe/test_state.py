"""recipe/state.py: what a change makes anew, and what stays. End to end on tiny models."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from checkpoint_damage import edit_tensors
from recipe_runs import STEPS, Make, weights

from compresskit.checkpoint.lock import locked
from compresskit.checkpoint.whole_files import write_whole
from compresskit.errors import Interrupted, RequestError
from compresskit.recipe.reading import load
from compresskit.recipe.run import REPORT, Wanted, run
from compresskit.recipe.state import State, exists


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


@pytest.mark.parametrize("name", ["../precious", "{absolute}", "..", "prune/../../precious", "", "x" * 300])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_state_that_names_a_folder_elsewhere_is_refused_and_nothing_is_removed(
    name: str, overwrite: bool, make: Make, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "photograph").touch()
    (tmp_path / "out" / "prune").mkdir(parents=True)
    step = {"key": "k", "status": "done", "result": {"stage": "prune"}}
    steps = {"prune": step, name.format(absolute=precious): step}
    state = json.dumps({"format_version": 1, "steps": steps})
    (tmp_path / "out" / "run.json").write_text(state)
    with pytest.raises(RequestError, match=r"run\.json: names a step .* which is no name of one; restore the file"):
        run(load(make()), tmp_path / "out", Wanted(overwrite=overwrite))
    assert (precious / "photograph").is_file()
    assert (tmp_path / "out" / "prune").is_dir()
    assert (tmp_path / "out" / "run.json").read_text() == state


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"output": ["m"]}, r"states \['m'\] for 'output' of step 'prune', expected a text"),
        ({"seconds": "1"}, "states '1' for 'seconds' of step 'prune', expected a number"),
        ({"stage": "evaluate"}, "states no 'text' of step 'prune', expected a text"),
    ],
)
def test_a_state_with_a_result_that_cannot_be_shown_is_refused(
    changed: dict[str, object], said: str, make: Make, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    step = {"key": "k", "status": "done", "result": {"stage": "prune", "method": "cfsp"} | changed}
    (tmp_path / "out" / "run.json").write_text(json.dumps({"format_version": 1, "steps": {"prune": step}}))
    with pytest.raises(RequestError, match=rf"run\.json: {said}; restore the file, or choose another OUT"):
        run(load(make()), tmp_path / "out", Wanted(dry_run=True))


@pytest.mark.parametrize("named", ["x" * 3000, "a/" * 3000, "x\0y", "~nobody-here/x", ""])
def test_a_recorded_output_that_is_no_path_is_none(named: str, tmp_path: Path) -> None:
    state = State(tmp_path, {"prune": {"key": "k", "status": "done", "result": {"stage": "prune", "output": named}}})
    assert state.output("prune") == tmp_path / "prune"


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


def test_a_request_that_is_refused_leaves_the_old_result(done: Path, text_file: Path, tmp_path: Path) -> None:
    before = weights(tmp_path / "out")
    reports = (tmp_path / "out" / "evaluate" / REPORT).read_text()
    done.write_text(done.read_text().replace(str(text_file), str(tmp_path / "missing.txt")))
    for overwrite in (False, True):
        with pytest.raises(RequestError, match=r"missing\.txt"):
            run(load(done), tmp_path / "out", Wanted(overwrite=overwrite))
        assert weights(tmp_path / "out") == before
        assert (tmp_path / "out" / "evaluate" / REPORT).read_text() == reports
    done.write_text(done.read_text().replace(str(tmp_path / "missing.txt"), str(text_file)))
    run(load(done), tmp_path / "out")
    assert weights(tmp_path / "out") == before


def test_starting_over_removes_the_outputs_of_steps_that_the_recipe_has_no_more(done: Path, tmp_path: Path) -> None:
    lines = [line for line in done.read_text().splitlines() if "compensate" not in line]
    done.write_text("\n".join(lines))
    assert run(load(done), tmp_path / "out", Wanted(overwrite=True))["ran"] == ["prune", "quantize", "evaluate"]
    assert not (tmp_path / "out" / "compensate").exists()
    assert "compensate" not in json.loads((tmp_path / "out" / "run.json").read_text())["steps"]


def test_a_step_s_folder_in_which_somebody_put_other_things_is_not_removed(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out" / "compensate"
    (folder / "compresskit.json").unlink()
    (folder / "thesis.tex").touch()
    lines = [line for line in done.read_text().splitlines() if "compensate" not in line]
    done.write_text("\n".join(lines))
    with pytest.raises(RequestError, match="holds what no step wrote, so it is not removed"):
        run(load(done), tmp_path / "out", Wanted(overwrite=True))
    assert (folder / "thesis.tex").is_file()


@pytest.mark.slow
def test_a_stop_between_two_writes_of_the_state_stops_no_later_run(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after each write of run.json in turn, a run that starts over ends with the same weights."""
    before = weights(tmp_path / "out")
    for stop in (1, 4):
        written = 0

        def stopping(path: Path, text: str, stop: int = stop) -> None:
            nonlocal written
            write_whole(path, text)
            written += path.name == "run.json"
            if written == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patched, pytest.raises((KeyboardInterrupt, Interrupted)):
            patched.setattr("compresskit.recipe.state.write_whole", stopping)
            run(load(done), tmp_path / "out", Wanted(overwrite=True))
        assert run(load(done), tmp_path / "out")["passed"]
        assert weights(tmp_path / "out") == before
        assert not list((tmp_path / "out").glob("*.partial"))


@pytest.mark.parametrize(
    "content",
    [
        '{"format_version": 1}', '{"format_version": 2, "steps": {}}', '{"format_version": 1, "steps": []}',
        '{"format_version": 1, "steps": {"prune": []}}', '{"format_version": 1, "steps": {"prune": {"key": 1}}}',
        '{"format_version": 1, "steps": {"prune": {"key": "k", "status": "gone", "result": null}}}',
        '{"format_version": 1, "steps": {"prune": {"key": "k", "status": "done", "result": []}}}', "[", "[]",
    ],
)  # fmt: skip
def test_a_state_that_is_none_is_one_line_with_its_name(content: str, make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(content)
    with pytest.raises(RequestError, match=r"run\.json: [^\n]*$"):
        run(load(make()), tmp_path / "out")


def test_a_second_run_in_the_same_folder_is_refused_with_the_first_one_s_process(make: Make, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    said = rf"out: process {os.getpid()} on .* is at work in it"
    with locked(tmp_path / "out" / ".lock", tmp_path / "out"), pytest.raises(RequestError, match=said):
        run(load(make()), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {".lock"}


@pytest.mark.parametrize("text", ["~nobody-of-this-name/text.txt", "a\0b", "x" * 5000])
def test_a_text_that_is_no_path_counts_by_its_letters_alone(text: str, tmp_path: Path) -> None:
    assert not exists(text)
