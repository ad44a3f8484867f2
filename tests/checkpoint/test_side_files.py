"""checkpoint/side_files.py: what is copied to OUT lies in SOURCE, whatever its links say. Property test."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from compresskit.checkpoint.side_files import SIDE_FILES, copy_side_files, side_files
from compresskit.errors import CheckpointError, StorageError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b'{"a": "\r\n"}')
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("the key")
    return path


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A snapshot as the Hub's client lays it: its files are links to blobs."""
    repository = tmp_path / "hub" / "models--who--what"
    folder = repository / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "1234").write_text("terms")
    (folder / "LICENSE").symlink_to(Path("..", "..", "blobs", "1234"))
    return folder


def test_files_are_found_and_copied_byte_for_byte(source: Path, out: Path) -> None:
    assert side_files(source) == {"tokenizer.json": source / "tokenizer.json"}
    copy_side_files(source, out)
    assert [path.name for path in out.iterdir()] == ["tokenizer.json"]
    assert (out / "tokenizer.json").read_bytes() == b'{"a": "\r\n"}'


def test_a_folder_that_is_not_there_has_no_side_files(tmp_path: Path) -> None:
    assert side_files(tmp_path / "absent") == {}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_link_out_of_the_source_is_refused_and_nothing_copied(name: str, source: Path, out: Path, secret: Path) -> None:
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    with pytest.raises(CheckpointError) as caught:
        copy_side_files(source, out)
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in (str(source / name), str(secret), "replace it by a copy"))
    assert list(out.iterdir()) == []


def test_a_link_to_a_link_out_of_the_source_is_refused(source: Path, secret: Path) -> None:
    (source / "inner").symlink_to(secret)
    (source / "LICENSE").symlink_to("inner")
    with pytest.raises(CheckpointError, match="outside"):
        side_files(source)


def test_a_name_below_a_linked_folder_is_refused(source: Path, secret: Path) -> None:
    (source / "adapter").symlink_to(secret.parent)
    with pytest.raises(CheckpointError, match="outside"):
        side_files(source, ("adapter/secret",))


def test_a_folder_whose_name_begins_alike_is_outside(source: Path) -> None:
    other = source.with_name("source-of-another")
    other.mkdir()
    (other / "LICENSE").write_text("theirs")
    (source / "LICENSE").symlink_to(other / "LICENSE")
    with pytest.raises(CheckpointError, match="outside"):
        side_files(source)


def test_a_link_inside_the_source_is_copied_as_a_file(source: Path, out: Path) -> None:
    (source / "LICENSE").symlink_to("tokenizer.json")
    linked = source.with_name("linked")
    linked.symlink_to(source)
    copy_side_files(linked, out)
    assert not (out / "LICENSE").is_symlink()
    assert (out / "LICENSE").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_a_snapshot_of_the_hub_s_cache_holds_links_to_its_own_blobs(snapshot: Path, out: Path) -> None:
    copy_side_files(snapshot, out)
    assert (out / "LICENSE").read_text() == "terms"
    assert not (out / "LICENSE").is_symlink()


@pytest.mark.parametrize("place", ["another repository", "beside the blobs", "linked blobs"])
def test_a_snapshot_s_link_to_anything_but_its_own_blobs_is_refused(place: str, snapshot: Path, secret: Path) -> None:
    repository = snapshot.parents[1]
    target = secret
    if place == "another repository":
        target = repository.with_name("models--who--else") / "blobs" / "1234"
        target.parent.mkdir(parents=True)
        target.write_text("theirs")
    elif place == "beside the blobs":
        target = repository / "refs"
        target.write_text("main")
    else:
        (repository / "blobs").rename(repository.with_name("blobs"))
        (repository / "blobs").symlink_to(repository.with_name("blobs"))
        target = repository / "blobs" / "1234"
    (snapshot / "LICENSE").unlink()
    (snapshot / "LICENSE").symlink_to(target)
    with pytest.raises(CheckpointError, match="outside"):
        side_files(snapshot)


def test_a_folder_that_is_only_called_blobs_allows_nothing(source: Path) -> None:
    blobs = source.parent / "blobs"
    blobs.mkdir()
    (blobs / "1234").write_text("terms")
    (source / "LICENSE").symlink_to(blobs / "1234")
    with pytest.raises(CheckpointError, match="outside"):
        side_files(source)


@pytest.mark.parametrize("kind", ["dangling", "circle", "folder", "pipe", "device"])
def test_what_is_no_file_is_refused_at_once(kind: str, source: Path) -> None:
    path = source / "LICENSE"
    if kind == "dangling":
        path.symlink_to(source / "absent")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError) as caught:
        side_files(source)
    assert str(path) in str(caught.value)
    assert "replace it by a copy" in str(caught.value)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o007])
def test_copies_have_the_permissions_that_the_process_gives(mask: int, source: Path, out: Path) -> None:
    (source / "tokenizer.json").chmod(0o400)
    before = os.umask(mask)
    try:
        copy_side_files(source, out)
    finally:
        os.umask(before)
    assert stat.S_IMODE((out / "tokenizer.json").stat().st_mode) == 0o666 & ~mask


def test_a_link_at_the_target_is_replaced_and_not_followed(source: Path, out: Path, secret: Path) -> None:
    (out / "tokenizer.json").symlink_to(secret)
    copy_side_files(source, out)
    assert secret.read_text() == "the key"
    assert not (out / "tokenizer.json").is_symlink()


def test_an_error_names_the_file_that_failed(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "tokenizer.json").mkdir()
    with pytest.raises(StorageError, match=str(out / "tokenizer.json")):
        copy_side_files(source, out)
    (out / "tokenizer.json").rmdir()

    def refused(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(CheckpointError, match=f"{source / 'tokenizer.json'}: cannot be read"):
        copy_side_files(source, out)


def test_a_full_disk_is_the_copy_s_fault(source: Path) -> None:
    with pytest.raises(StorageError, match="/dev/full"):
        from compresskit.checkpoint import side_files as module

        module._copy(source / "tokenizer.json", FullDisk("/dev/full"))


class FullDisk(type(Path())):  # type: ignore[misc]
    """/dev/full, which is there already."""

    def unlink(self, missing_ok: bool = False) -> None:
        """It stays."""

    def open(self, mode: str = "r", **options: object) -> object:  # type: ignore[override]
        return open(self, "wb")  # noqa: PTH123
