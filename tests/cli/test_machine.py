"""cli/machine.py: results on standard output, exit codes, nothing removed in a dry run. End to end."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from conftest import Run
from filelock import FileLock

from compresskit.checkpoint import demo


@pytest.fixture
def structure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that holds one structure, of ten days ago."""
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path))
    path = tmp_path / "structures" / f"{'a' * 64}.json"
    path.parent.mkdir()
    path.write_text("{}")
    os.utime(path, (time.time() - 864_000,) * 2)
    return path


def test_doctor_prints_its_findings_and_exits_with_0(run: Run) -> None:
    code, out, err = run("doctor", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["problems"] == []


def test_doctor_exits_with_1_and_one_line_where_something_is_broken(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "file"))
    code, out, err = run("doctor")
    assert code == 1
    assert "PROBLEM" in out
    assert err.startswith("compresskit: error: ")
    assert err.count("\n") == 1


def test_the_cache_is_listed(run: Run, structure: Path) -> None:
    code, out, _ = run("cache", "list")
    assert (code, out.splitlines()[-1]) == (0, "1 entries, 2 B")
    assert f"10.0 days  {structure}" in out
    found = json.loads(run("cache", "list", "--json")[1])
    assert found["bytes"] == 2
    assert [each["kind"] for each in found["entries"]] == ["structures"]


def test_a_dry_run_and_young_entries_stay(run: Run, structure: Path) -> None:
    assert json.loads(run("cache", "clean", "--dry-run", "--json")[1])["bytes"] == 2
    assert run("cache", "clean", "--older-than", 11)[:2] == (0, "0 entries, 0 B\n")
    assert run("cache", "clean", "--kind", "demo")[0] == 0
    assert structure.is_file()
    code, out, err = run("cache", "clean", "--older-than", 9, "--json")
    assert (code, err, json.loads(out)["kept"]) == (0, "", [])
    assert not structure.exists()


@pytest.mark.parametrize(("flags", "said"), [(("--older-than", "-1"), "--older-than"), (("--kind", "x"), "--kind x")])
def test_wrong_values_are_refused(run: Run, structure: Path, flags: tuple[str, str], said: str) -> None:
    code, out, err = run("cache", "clean", *flags)
    assert (code, out) == (2, "")
    assert said in err
    assert structure.is_file()


def test_what_is_in_use_is_kept_and_named(run: Run, structure: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo" / demo.NAME
    folder.mkdir(parents=True)
    (folder / demo.RECORD).write_text("{}")
    with FileLock(folder.parent / f"{demo.NAME}.lock"):
        code, out, err = run("cache", "clean", "--json")
    assert (code, json.loads(out)["kept"]) == (0, [str(folder)])
    assert err == f"compresskit: warning: {folder}: another process is at work on it\n"
    assert folder.is_dir()
    assert not structure.exists()
