"""recipe/work.py: a step is done again by a process that knows nothing of the one that died with it. End to end."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
from recipe_runs import weights

from compresskit.checkpoint.work_folder import WorkFolder
from compresskit.recipe.reading import load
from compresskit.recipe.state import State, open_state
from compresskit.recipe.work import Work, do, do_again, work_of


def begun(recipe: Path, out: Path, name: str) -> Work:
    """The work of a step that the state says is running, as another process gets it."""
    step = load(recipe).step(name)
    state: State = open_state(out, False)
    goes_on = state.begin(step, "another key")
    found: Work = pickle.loads(pickle.dumps(work_of(step, state, goes_on)))
    assert not found.goes_on
    return found


def die_before_it_commits(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(folder: WorkFolder) -> None:
        raise SystemExit

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("compresskit.checkpoint.folder.commit", dying)
        do(work, quiet=True)


@pytest.mark.parametrize("name", ["prune", "quantize", "compensate"])
def test_what_a_dead_process_left_is_taken_up(name: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    before = weights(out)
    shutil.rmtree(out / name)
    work = begun(done, out, name)
    die_before_it_commits(work, monkeypatch)
    blocks = json.loads(WorkFolder(out / name).progress.read_text())["blocks"]
    assert blocks
    walked: list[object] = []
    monkeypatch.setattr("compresskit.checkpoint.writer.Writer.finish_block", lambda *given: walked.append(given))
    assert do_again(work, quiet=True)["output"] == str(out / name)
    assert walked == []
    assert weights(out) == before


@pytest.mark.parametrize("name", ["quantize", "evaluate"])
def test_what_a_dead_process_had_finished_is_not_done_again(
    name: str, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.rmtree(out / name)
    work = begun(done, out, name)
    result = do_again(work, quiet=True)
    monkeypatch.setattr("compresskit.recipe.work.do", lambda *given: pytest.fail("it had finished"))
    again = do_again(work, quiet=True)
    assert again["stage"] == result["stage"]
    assert {key: again[key] for key in ("bytes_after", "perplexity") if key in again} == {
        key: result[key] for key in ("bytes_after", "perplexity") if key in result
    }


def test_an_older_output_is_not_taken_for_the_new_one(done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done.write_text(done.read_text().replace("bits: 4", "bits: 3"))
    work = begun(done, out, "quantize")
    assert work.replaces is not None
    assert do_again(work, quiet=True)["settings"]["bits"] == 3
