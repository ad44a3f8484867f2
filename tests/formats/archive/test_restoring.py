"""formats/archive/restoring.py: the same files bit by bit, or a refusal that names the damage. Property, by mutation."""

from __future__ import annotations

import errno
import random
import resource
from pathlib import Path

import pytest
from archive_files import KINDS, content, forged, mutated, read, silent, small_folder, write

from compresskit.errors import CheckpointError, RequestError, StorageError
from compresskit.formats.archive import restoring
from compresskit.formats.archive.container import open_archive
from compresskit.formats.archive.restoring import restore, restored_folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("restoring")
    write(small_folder(folder / "source"), folder / "a.ckz")
    return folder


@pytest.mark.parametrize("threads", [1, 3])
def test_every_file_comes_back_bit_by_bit(threads: int, packed: Path, tmp_path: Path) -> None:
    found = restored_folder(packed / "a.ckz", tmp_path / "out", False, threads, silent)
    assert content(tmp_path / "out") == content(packed / "source")
    assert len(found.files) == 5
    with pytest.raises(RequestError, match="exists already"):
        restored_folder(packed / "a.ckz", tmp_path / "out", False, threads, silent)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_archive_gives_the_original_or_a_clean_error(kind: str, packed: Path, tmp_path: Path) -> None:
    original, wanted, generator = (packed / "a.ckz").read_bytes(), content(packed / "source"), random.Random(kind)
    for _ in range(45):
        (tmp_path / "d.ckz").write_bytes(mutated(original, kind, generator.getrandbits(40), generator.getrandbits(40)))
        try:
            assert read(tmp_path / "d.ckz", tmp_path / "out") == wanted
        except CheckpointError as error:
            assert str(tmp_path / "d.ckz") in str(error)
            assert "\n" not in str(error)


def test_the_damaged_section_is_named_and_nothing_is_left(packed: Path, tmp_path: Path) -> None:
    data = bytearray((packed / "a.ckz").read_bytes())
    archive = open_archive(packed / "a.ckz")
    number = next(i for i, section in enumerate(archive.sections) if section.kind == "codes")
    data[archive.starts()[number] + 40] ^= 4
    (tmp_path / "d.ckz").write_bytes(data)
    place = archive.sections[number].places[0][0]
    with pytest.raises(CheckpointError, match=rf"model\.safetensors from byte {place:,} on: its checksum is wrong"):
        restored_folder(tmp_path / "d.ckz", tmp_path / "out", False, 2, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["d.ckz"]


def test_another_digest_than_the_file_had_is_refused(packed: Path, tmp_path: Path) -> None:
    def change(index: dict[str, list[list[object]]]) -> None:
        index["files"][1][2] = "0" * 64

    (tmp_path / "d.ckz").write_bytes(forged((packed / "a.ckz").read_bytes(), change))
    with pytest.raises(CheckpointError, match=r"config\.json came out with another SHA-256"):
        restored_folder(tmp_path / "d.ckz", tmp_path / "out", False, 1, silent)
    assert [path.name for path in tmp_path.iterdir()] == ["d.ckz"]


def test_a_disk_that_fails_is_named(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        restore(open_archive(packed / "a.ckz"), tmp_path, 1, silent)


def test_an_archive_that_cannot_be_read_any_more_is_no_disk_that_cannot_be_written(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: int, start: int, data: memoryview) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(restoring, "fill", fail)
    with pytest.raises(CheckpointError, match=r"a\.ckz: the section of .* Input/output error; get an intact copy"):
        restore(open_archive(packed / "a.ckz"), tmp_path, 1, silent)


def test_a_folder_has_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    source, spare = tmp_path / "source", 20
    source.mkdir()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + spare
    for number in range(limit + 1):
        (source / f"{number}.txt").write_text(str(number))
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        write(source, tmp_path / "a.ckz", 2)
        assert read(tmp_path / "a.ckz", tmp_path / "out") == content(source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
