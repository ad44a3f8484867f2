"""cli/ci_files.py: the files for a CI service are refused before the work, written whole, and named where they fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Run

from compresskit.cli.ci_files import CiFile, asked_for, write
from compresskit.errors import RequestError, StorageError
from compresskit.recipe.verdict import SUMMARY_VARIABLE

RESULT: dict[str, Any] = {"gates": [], "steps": {}, "seconds": 1.0, "passed": True}


@pytest.fixture(autouse=True)
def _outside_of_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUMMARY_VARIABLE, raising=False)


def test_both_files_are_written_and_a_summary_is_added_to(tmp_path: Path) -> None:
    junit, summary = tmp_path / "new" / "junit.xml", tmp_path / "summary.md"
    summary.write_text("before\n")
    junit.parent.mkdir()
    junit.write_text("an older one")
    write(asked_for(junit, summary), RESULT)
    assert ElementTree.parse(junit).getroot().tag == "testsuites"
    assert summary.read_text().startswith("before\n## compresskit")
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["junit.xml", "new", "summary.md"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "target.xml").write_text("older")
    (tmp_path / "link.xml").symlink_to(tmp_path / "target.xml")
    CiFile("--junit", tmp_path / "link.xml").replace("newer")
    assert (tmp_path / "link.xml").is_symlink()
    assert (tmp_path / "target.xml").read_text() == "newer"


def test_a_summary_that_is_asked_for_twice_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUMMARY_VARIABLE, str(tmp_path / "summary.md"))
    write(asked_for(None, tmp_path / "summary.md"), RESULT)
    assert (tmp_path / "summary.md").read_text().count("## compresskit") == 1


@pytest.mark.parametrize("flag", ["--junit", "--summary", f"${SUMMARY_VARIABLE}"])
@pytest.mark.parametrize("fault", ["folder", "under a file"])
def test_run_refuses_a_file_that_cannot_be_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, fault: str
) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path if fault == "folder" else tmp_path / "file" / "below"
    given = ("--junit", path) if flag == "--junit" else ("--summary", path) if flag == "--summary" else ()
    if not given:
        monkeypatch.setenv(SUMMARY_VARIABLE, str(path))
    code, out, err = run("run", "ci-gate", tmp_path / "out", "--source", tmp_path / "none", *given)
    assert (code, out) == (2, "")
    assert err.startswith(f"compresskit: error: {flag} {path}: ")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    for asked in ("--junit", "--summary"):
        with pytest.raises(RequestError, match=f"{asked} .*closed/a: cannot be written to"):
            CiFile(asked, tmp_path / "closed" / "a").check()


def test_a_full_device_is_named() -> None:
    file = CiFile("--summary", Path("/dev/full"))
    file.check()
    for write_text in (file.append, file.replace):
        with pytest.raises(StorageError, match="/dev/full: cannot be written"):
            write_text("text")
    assert Path("/dev/full").is_char_device()
