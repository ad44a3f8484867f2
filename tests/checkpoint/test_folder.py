"""checkpoint/folder.py and checkpoint/work_folder.py: OUT is the old or the new whole folder, only ours is removed. Property."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from compresskit.checkpoint import folder as folders
from compresskit.checkpoint import work_folder
from compresskit.checkpoint.folder import commit, discard, held, settle, start_result, whole_folder
from compresskit.checkpoint.work_folder import WorkFolder, check_out, check_space, is_ours
from compresskit.errors import RequestError, StorageError, StorageWarning

OURS = json.dumps({"tool": "compresskit"})


def make(out: Path, content: str) -> Path:
    """A finished folder of ours."""
    out.mkdir()
    (out / "compresskit.json").write_text(json.dumps({"tool": "compresskit", "content": content}))
    (out / "content").write_text(content)
    return out


def write(out: Path, content: str, overwrite: bool = True) -> None:
    with whole_folder(out, overwrite) as partial:
        (partial / "content").write_text(content)
        (partial / "compresskit.json").write_text(json.dumps({"tool": "compresskit", "content": content}))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_new_folder_takes_the_place_of_the_old_one_and_nothing_is_left(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    (out / "notes").touch()
    write(out, "new")
    assert names(tmp_path) == {"out"}
    assert names(out) == {"content", "compresskit.json"}
    assert (out / "content").read_text() == "new"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_not_ours_is_never_replaced(overwrite: bool, tmp_path: Path) -> None:
    out = tmp_path / "photographs"
    out.mkdir()
    (out / "sea.jpg").touch()
    with pytest.raises(RequestError, match="not made by a stage of compresskit" if overwrite else "exists already"):
        check_out(out, tmp_path / "source", overwrite)
    with pytest.raises((StorageError, RequestError)):
        write(out, "new", overwrite)
    assert names(out) == {"sea.jpg"}


@pytest.mark.parametrize("manifest", ["{", "[]", '{"tool": "another"}', "\udcff"])
def test_a_manifest_of_another_tool_or_none_at_all_shows_nothing_to_be_ours(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "compresskit.json").write_text(manifest, errors="surrogateescape")
    assert not is_ours(tmp_path)


def test_an_empty_folder_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "content").read_text() == "new"


def test_a_link_is_not_replaced_and_says_where_it_leads(tmp_path: Path) -> None:
    real = make(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to(real)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    for name, target in (("out", "real"), ("nowhere", "missing")):
        with pytest.raises(RequestError, match=f"{name}: is a symbolic link to .*{target}; give the folder itself"):
            check_out(tmp_path / name, tmp_path / "source", True)
        with pytest.raises(RequestError, match="exists already"):
            check_out(tmp_path / name, tmp_path / "source", False)
    assert (real / "content").read_text() == "old"


@pytest.mark.parametrize("what", ["folder", "file", "link"])
def test_a_foreign_folder_under_the_name_of_the_work_folder_is_refused_and_stays(what: str, tmp_path: Path) -> None:
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.tex").touch()
    if what == "folder":
        shutil.copytree(tmp_path / "elsewhere", partial)
    elif what == "file":
        partial.write_text("thesis")
    else:
        partial.symlink_to(tmp_path / "elsewhere")
    for attempt in (lambda: check_out(out, tmp_path / "source", False), lambda: write(out, "new")):
        with pytest.raises(RequestError, match=r"out\.partial: is in the way of unfinished output"):
            attempt()
    assert partial.is_file() if what == "file" else names(partial) == {"thesis.tex"}


@pytest.mark.parametrize("there", ["full", "file", "link"])
def test_an_out_that_appears_while_the_work_is_done_stays_and_the_result_too(there: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = r"out: the finished result cannot get this name .*out\.partial/result"
    with pytest.raises(StorageError, match=said), held(out, overwrite=False) as work:
        (start_result(work) / "compresskit.json").write_text(OURS)
        if there == "full":
            out.mkdir()
            (out / "sea.jpg").touch()
        elif there == "file":
            out.write_text("sea")
        else:
            out.symlink_to(tmp_path)
        commit(work)
    assert names(out) == {"sea.jpg"} if there == "full" else os.path.lexists(out)
    assert is_ours(WorkFolder(out).result)


def test_a_foreign_folder_that_takes_the_place_of_the_old_out_meanwhile_stays(tmp_path: Path) -> None:
    out = make(tmp_path / "out", "old")
    with pytest.raises(StorageError, match="not made by a stage"), held(out, overwrite=True) as work:
        (start_result(work) / "compresskit.json").write_text(OURS)
        shutil.rmtree(out)
        out.mkdir()
        (out / "sea.jpg").touch()
        commit(work)
    assert names(out) == {"sea.jpg"}


KILLED = """
import os, sys
from pathlib import Path
from compresskit.checkpoint import folder

out, stop, exchange = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
if not exchange:
    folder.exchange = lambda first, second: False
seen = 0
def step(call):
    def counted(*arguments, **named):
        global seen
        seen += 1
        if seen == stop:
            os._exit(9)
        return call(*arguments, **named)
    return counted
for name in ("rename", "unlink", "mkdir", "rmdir"):
    setattr(Path, name, step(getattr(Path, name)))
folder.shutil.rmtree = step(folder.shutil.rmtree)
folder.sync = step(folder.sync)
with folder.whole_folder(out, True) as partial:
    (partial / "content").write_text("new")
    (partial / "compresskit.json").write_text('{"tool": "compresskit", "content": "new"}')
"""


@pytest.mark.parametrize("how", [pytest.param("exchange", marks=pytest.mark.slow), "two renames"])
def test_killed_at_any_step_out_is_the_old_or_the_new_one_after_the_next_command(how: str, tmp_path: Path) -> None:
    """With an exchange, at once; without, between two renames, OUT is brought back by whatever comes next."""
    found = set()
    for stop in range(1, 60):
        out = make(tmp_path / "out", "old")
        code = subprocess.run([sys.executable, "-c", KILLED, str(out), str(stop), how], check=False).returncode
        if how == "exchange":
            assert (out / "content").read_text() in ("old", "new")
        settle(out)
        content = (out / "content").read_text()
        found.add(content)
        assert json.loads((out / "compresskit.json").read_text())["content"] == content
        write(out, "newer")
        assert names(tmp_path) == {"out"}
        assert names(out) == {"content", "compresskit.json"}
        shutil.rmtree(out)
        if code == 0:
            break
    assert code == 0
    assert found == {"old", "new"}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_name_that_the_disk_does_not_confirm_is_a_warning_and_no_failure(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if overwrite:
        make(out, "old")
    real = folders.sync

    def sync(path: Path) -> None:
        if path == tmp_path:
            raise StorageError(f"{path}: cannot be written (Input/output error)")
        real(path)

    monkeypatch.setattr(folders, "sync", sync)
    with pytest.warns(StorageWarning, match="out: is whole, but the disk did not confirm its name"):
        write(out, "new", overwrite)
    assert (out / "content").read_text() == "new"
    assert names(tmp_path) == {"out"}


def test_what_cannot_be_removed_is_a_warning_and_goes_with_the_next_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", "old")

    def rmtree(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(folders.shutil, "rmtree", rmtree)
        with pytest.warns(StorageWarning, match=r"out\.partial: cannot be removed \(Input/output error\)"):
            write(out, "new")
    assert (out / "content").read_text() == "new"
    settle(out)
    assert names(tmp_path) == {"out"}


def test_finished_work_is_settled_around_and_discarded_on_demand(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), held(out, overwrite=False) as work:
        start_result(work)
        work.progress.write_text("{}")
        raise KeyboardInterrupt
    settle(out)
    assert WorkFolder(out).progress.is_file()
    discard(out)
    assert names(tmp_path) == set()


def test_scratch_that_a_killed_process_left_goes_at_the_next_start(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "out")
    (work.path / "scratch" / "left").mkdir(parents=True)
    work.lock.touch()
    with held(work.out, overwrite=False) as again, again.scratch() as scratch:
        assert names(work.path / "scratch") == {scratch.name}
    assert names(tmp_path) == set()


def test_a_full_disk_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        pytest.raises(StorageError, match=r"No space left.*what is finished stays.*--resume"),
        held(out, overwrite=False) as work,
    ):
        start_result(work)
        work.progress.write_text("{}")
        raise StorageError("model.safetensors: No space left on device")
    assert WorkFolder(out).progress.is_file()


def test_outputs_that_cannot_be_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make(tmp_path / "source", "model")
    (tmp_path / "file").touch()
    refusals = [
        (source, False, "exists already"),
        (tmp_path / "file", True, "is a file"),
        (source / "deep" / "out", False, "inside the source"),
        (Path(tmp_path.anchor), True, "names no new folder"),
        (tmp_path / "deep" / "..", True, "names no new folder"),
        (tmp_path / "file" / "out", False, "cannot be written to"),
    ]
    for out, overwrite, said in refusals:
        with pytest.raises(RequestError, match=said):
            check_out(out, source, overwrite)
    (tmp_path / "compresskit.json").write_text(OURS)
    with pytest.raises(RequestError, match="contains the source"):
        check_out(tmp_path, source, True)
    monkeypatch.setattr(work_folder, "SPARE_BYTES", 10**18)
    with pytest.raises(RequestError, match="GB free"):
        check_space(tmp_path / "out", 10)


def test_an_old_out_that_waits_for_its_removal_is_not_taken_for_unfinished_work(tmp_path: Path) -> None:
    """Killed after the exchange of names; then somebody removes the new OUT and asks to resume."""
    out = make(tmp_path / "out", "old")
    child = os.fork()
    if child == 0:
        with held(out, overwrite=True) as work:
            work.progress.write_text("{}")
            (start_result(work) / "compresskit.json").write_text(OURS)
            work.progress.write_text("{}")
            commit(work)
            os._exit(0)
    os.waitpid(child, 0)
    shutil.rmtree(out)
    with held(out, overwrite=False, resume=True) as work:
        assert not work.progress.exists()
        assert not work.result.exists()
    assert names(tmp_path) == set()
