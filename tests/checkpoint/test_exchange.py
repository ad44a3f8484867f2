"""checkpoint/exchange.py: two names change places in one step. Property."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from compresskit.checkpoint.exchange import exchange


def folders(tmp_path: Path) -> tuple[Path, Path]:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "name").write_text(folder.name)
    if not exchange(first, second):
        pytest.skip("this file system exchanges no names")
    return first, second


def test_both_folders_have_the_other_s_name(tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    assert [(folder / "name").read_text() for folder in (first, second)] == ["second", "first"]


def test_no_moment_is_without_either_name(tmp_path: Path) -> None:
    first, second = folders(tmp_path)
    missed: list[bool] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            missed.append(not (first.exists() and second.exists()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(2000):
        assert exchange(first, second)
    stop.set()
    watcher.join()
    assert missed and not any(missed)


def test_a_name_that_is_missing_is_an_error_with_both_names(tmp_path: Path) -> None:
    first, _ = folders(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        exchange(first, tmp_path / "third")
    assert (caught.value.filename, caught.value.filename2) == (str(first), str(tmp_path / "third"))
