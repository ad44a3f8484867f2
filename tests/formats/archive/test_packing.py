"""formats/archive/packing.py, formats/archive/threads.py: what is packed or refused, and the same bytes from any threads."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from archive_files import silent, small_folder, write

from compresskit.checkpoint import small_files
from compresskit.checkpoint.small_files import MOST_VALUES
from compresskit.errors import CheckpointError, RequestError
from compresskit.formats.archive import packing
from compresskit.formats.archive.packing import check_outside, check_recorded, digests_of, files_of, pack_files, planned_sections
from compresskit.formats.archive.threads import in_order, threads_to_use


def test_any_number_of_threads_writes_the_same_bytes(tmp_path: Path) -> None:
    source = small_folder(tmp_path / "source")
    for threads in (1, 3):
        write(source, tmp_path / f"{threads}.ckz", threads)
    assert (tmp_path / "1.ckz").read_bytes() == (tmp_path / "3.ckz").read_bytes()


def test_a_link_to_a_file_stands_for_the_file(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "blob").write_text("text")
    (tmp_path / "source" / "config.json").symlink_to("blob")
    files = files_of(tmp_path / "source")
    assert [(file.name, file.stamp.bytes) for file in files] == [("blob", 4), ("config.json", 4)]
    assert digests_of(files, 2) == dict.fromkeys(("blob", "config.json"), hashlib.sha256(b"text").hexdigest())


def test_what_an_archive_cannot_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        files_of(tmp_path / "none")
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(CheckpointError, match="holds no file"):
        files_of(source)
    for make, reason in (
        (lambda path: path.symlink_to(tmp_path), "a link to a folder"),
        (os.mkfifo, "a pipe, a socket or a device"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read"),
        (lambda path: path.symlink_to("/etc/hostname"), "outside"),
    ):
        make(source / "x")
        with pytest.raises(CheckpointError, match=reason):
            files_of(source)
        (source / "x").unlink()
    (source / "a:b").touch()
    with pytest.raises(CheckpointError, match="is a file, expected a folder"):
        files_of(source / "a:b")
    with pytest.raises(CheckpointError, match="is no file inside"):
        files_of(source)


def test_a_file_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source = small_folder(tmp_path / "source")
    files = files_of(source)
    sections, digests = planned_sections(files), digests_of(files, 1)
    os.utime(source / "config.json", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"config\.json: changed while it was packed"):
        pack_files(files, sections, digests, tmp_path / "a.ckz", 1, silent)
    with pytest.raises(CheckpointError, match="changed while"):
        planned_sections(files)


def test_more_sections_than_an_index_holds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "MOST_SECTIONS", 3)
    with pytest.raises(RequestError, match=r"source: .* an archive has 3; pack parts"):
        planned_sections(files_of(small_folder(tmp_path / "source")))


def test_an_index_of_the_most_sections_is_read_again() -> None:
    """Codes have the longest entries of those that large folders have many of."""
    text = json.dumps([0, "codes", [2, 4, 16], "codes with zero points", [[0, 6144], [6144, 96]], 5000, 0])
    assert packing.MOST_SECTIONS * (1 + sum(map(text.count, ",[{"))) < MOST_VALUES


def test_an_archive_that_cannot_be_read_again_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_files, "MOST_VALUES", 100)
    with pytest.raises(RequestError, match=r"source: its archive cannot be opened again.*more than 100 values.*; pack parts"):
        write(small_folder(tmp_path / "source"), tmp_path / "a.ckz")


def test_a_file_that_is_lost_meanwhile_is_named(tmp_path: Path) -> None:
    source = small_folder(tmp_path / "source")
    files = files_of(source)
    (source / "noise.bin").unlink()
    with pytest.raises(CheckpointError, match=r"noise\.bin: changed while it was packed"):
        planned_sections(files)


def test_files_are_compared_with_the_manifest(tmp_path: Path) -> None:
    check_recorded(tmp_path, {"a": "1"}, {"a": "1", "b": "2"})
    with pytest.raises(CheckpointError, match="a: SHA-256 is 1, the manifest recorded 3"):
        check_recorded(tmp_path, {"a": "3"}, {"a": "1"})
    with pytest.raises(CheckpointError, match="c: is not there"):
        check_recorded(tmp_path, {"c": "3"}, {"a": "1"})


def test_an_archive_does_not_lie_in_what_it_is_made_of(tmp_path: Path) -> None:
    check_outside(tmp_path / "a.ckz", tmp_path / "a")
    with pytest.raises(RequestError, match="lies inside the source"):
        check_outside(tmp_path / "a" / ".." / "a" / "b.ckz", tmp_path / "a")


def test_results_come_in_order_and_few_items_wait() -> None:
    taken: list[int] = []

    def items() -> object:
        for number in range(20):
            taken.append(number)
            yield number

    results = in_order(lambda number: number * number, items(), 2)  # type: ignore[call-overload]
    assert next(results) == 0
    assert len(taken) <= 4
    assert list(results) == [number * number for number in range(1, 20)]
    assert threads_to_use(5) == 5
    assert threads_to_use(0) >= 1


def test_what_the_work_raises_ends_it() -> None:
    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda number: 1 // number, [1, 0, 1], 2))
