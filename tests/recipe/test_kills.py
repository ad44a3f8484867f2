"""recipe/state.py and recipe/run.py: a run goes on after a kill at any moment, and removes what is its own alone. End to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from checkpoint_damage import edit_tensors
from dying_children import dying_at
from recipe_runs import STEPS, weights

from compresskit.checkpoint.folder import settle
from compresskit.checkpoint.whole_files import write_whole
from compresskit.checkpoint.work_folder import WorkFolder
from compresskit.errors import Interrupted, RequestError
from compresskit.recipe.reading import load
from compresskit.recipe.run import REPORT, Wanted, run
from compresskit.recipe.state import State, open_state, output_digest


def at_work(out: Path, name: str, left: tuple[str, ...]) -> None:
    """What the state says and the folder holds while a step writes its report."""
    folder = out / name
    for path in folder.iterdir():
        path.unlink()
    for file in left:
        (folder / file).write_text("{}" if file == REPORT else "")
    state = json.loads((out / "run.json").read_text())
    state["steps"][name] |= {"status": "running", "result": None, "replaces": output_digest(folder)}
    (out / "run.json").write_text(json.dumps(state))


def killed_before_it_commits(recipe: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a step's output anew up to the moment at which it is complete, with its manifest, and has not got its name."""
    shutil.rmtree(out / name)

    def stopping(work: WorkFolder) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        patched.setattr("compresskit.checkpoint.folder.commit", stopping)
        run(load(recipe), out, Wanted(only=name))


def killed_as_it_begins(recipe: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a recipe up to the moment at which the state says that a step is running, and nothing of it is done yet."""
    states = []

    def stopping(path: Path, text: str) -> None:
        write_whole(path, text)
        if path.name == "run.json":
            states.append(json.loads(text)["steps"].get(name, {}).get("status"))
            if len(states) > 1 and states[-1] == "running":  # the first is the state as it was found
                raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("compresskit.recipe.state.write_whole", stopping)
        run(load(recipe), out)


@pytest.mark.parametrize("left", [(), ("report.json.new",), ("report.json.new", "report.json")])
def test_killed_while_it_wrote_its_report_a_step_runs_again(left: tuple[str, ...], done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    at_work(out, "evaluate", left)
    assert run(load(done), out)["ran"] == ["evaluate"]
    assert [path.name for path in (out / "evaluate").iterdir()] == ["report.json"]


@pytest.mark.parametrize("left", [("report.json",), ("report.json.new",)])
def test_what_a_kill_left_of_a_report_gives_way_to_a_model_of_the_same_name(
    left: tuple[str, ...], done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    at_work(out, "evaluate", left)
    done.write_text(
        done.read_text().split("  - {evaluate")[0] + "  - {name: evaluate, prune: magnitude, source: source, sparsity: 0.5}\n"
    )
    assert run(load(done), out)["ran"] == ["evaluate"]
    assert (out / "evaluate" / "compresskit.json").is_file()
    assert not (out / "evaluate" / left[0]).exists()


@pytest.mark.parametrize("name", STEPS[:3])
def test_killed_while_it_wrote_its_manifest_a_step_goes_on(
    name: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = weights(out)
    killed_before_it_commits(done, out, name, monkeypatch)
    manifest = WorkFolder(out / name).result / "compresskit.json"
    assert manifest.is_file()
    manifest.write_text("")
    assert run(load(done), out)["ran"] == [name]
    assert weights(out) == before


def test_killed_as_it_begins_another_request_a_step_does_not_take_up_the_old_one_s_work(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, recipe = tmp_path / "out", done.read_text()
    killed_before_it_commits(done, out, "quantize", monkeypatch)
    assert WorkFolder(out / "quantize").progress.is_file()
    done.write_text(recipe.replace("bits: 4", "bits: 3"))
    killed_as_it_begins(done, out, "quantize", monkeypatch)
    assert run(load(done), out, Wanted(only="quantize"))["ran"] == ["quantize"]


def test_killed_as_it_makes_a_damaged_output_again_a_step_does_not_take_that_for_its_own(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    before = weights(out)
    edit_tensors(out / "quantize", lambda tensors: tensors["model.norm.weight"].add_(1))
    killed_as_it_begins(done, out, "quantize", monkeypatch)
    assert run(load(done), out)["ran"] == ["quantize"]
    assert weights(out) == before


def test_killed_between_two_renames_and_again_a_step_does_not_take_its_old_output_for_the_new_one(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where names cannot be exchanged, the old output waits in the work folder, and comes back with the next command."""
    out = tmp_path / "out"
    done.write_text(done.read_text().replace("bits: 4", "bits: 3"))
    killed_as_it_begins(done, out, "quantize", monkeypatch)
    work = WorkFolder(out / "quantize")
    work.path.mkdir()
    work.lock.touch()
    work.out.rename(work.replaced)
    killed_as_it_begins(done, out, "quantize", monkeypatch)
    settle(out / "quantize")
    assert "quantize" in run(load(done), out)["ran"]
    assert json.loads((out / "quantize" / "compresskit.json").read_text())["settings"]["bits"] == 3


def test_killed_at_any_step_of_it_the_removal_of_an_output_is_completed_by_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in range(1, 60):
        (out / "prune").mkdir(parents=True)
        for file in ("compresskit.json", "a", "b", "c"):
            (out / "prune" / file).write_text('{"tool": "compresskit"}')
        state = outdated(out, "prune")
        state.save()
        came_to_its_end = dying_at(step, lambda state=state: state.clear([]))
        open_state(out, False).clear([])
        assert {path.name for path in out.iterdir()} == {"run.json"}
        assert json.loads((out / "run.json").read_text())["steps"] == {}
        shutil.rmtree(out)
        if came_to_its_end:
            break
    assert came_to_its_end


def outdated(out: Path, name: str) -> State:
    """The state of a run that starts over."""
    return State(out, {name: {"key": "k", "status": "outdated", "result": {"stage": "prune"}}})


@pytest.mark.parametrize("left", [("report.json",), ("report.json.new",), ("report.json", "report.json.new")])
def test_a_report_and_what_a_kill_left_of_one_are_removed(left: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    for name in left:
        (tmp_path / "evaluate" / name).touch()
    outdated(tmp_path, "evaluate").clear([])
    assert {path.name for path in tmp_path.iterdir()} == {"run.json"}


@pytest.mark.parametrize("there", ["file", "link", "folder in it", "link in it", "file beside it"])
def test_what_no_step_wrote_under_the_name_of_a_step_is_not_removed(there: str, tmp_path: Path) -> None:
    folder, precious = tmp_path / "evaluate", tmp_path / "precious"
    precious.mkdir()
    (precious / REPORT).write_text("a thesis")
    if there == "file":
        folder.write_text("a thesis")
    elif there == "link":
        folder.symlink_to(precious)
    elif there == "folder in it":
        shutil.copytree(precious, folder / REPORT)
    elif there == "link in it":
        folder.mkdir()
        (folder / REPORT).symlink_to(precious / REPORT)
    else:
        shutil.copytree(precious, folder)
        (folder / "report.json.new.tex").touch()
    before = {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")}
    with pytest.raises(RequestError, match=r"evaluate: holds what no step wrote, so it is not removed; [^\n]*$"):
        outdated(tmp_path, "evaluate").clear([])
    assert {path: path.is_dir() or path.read_text() for path in tmp_path.rglob("*")} == before
