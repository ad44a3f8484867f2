"""formats/archive/container.py: an index that contradicts itself or the file is refused before anything is decoded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from archive_files import forged, small_folder, write

from compresskit.errors import CheckpointError
from compresskit.formats.archive.container import END, MAGIC, by_kind, open_archive


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("container")
    write(small_folder(folder / "source"), folder / "a.ckz")
    return folder / "a.ckz"


def test_the_index_says_what_is_inside(archive: Path) -> None:
    found = open_archive(archive)
    assert {file.name for file in found.files} == {
        "adapter/adapter_model.safetensors", "config.json", "empty", "model.safetensors", "noise.bin",
    }  # fmt: skip
    kinds = by_kind(found.sections)
    assert kinds["codes with zero points"]["bytes"] == 96 * 64 + 96 * 2 // 32 * 16
    assert sum(kind["bytes"] for kind in kinds.values()) == found.bytes
    assert found.starts()[-1] + found.sections[-1].stored < archive.stat().st_size - END.size


def test_an_unchanged_forgery_opens(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "f.ckz").write_bytes(forged(archive.read_bytes(), lambda index: None))
    assert open_archive(tmp_path / "f.ckz").files == open_archive(archive).files


BAD_NAMES = ("../x", "/x", "a\\b", "a//b", "", "C:x", "config.json/x", "config.json", 5, "\x00", "a/" * 1000 + "x")


def setter(*keys: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        value: Any = index
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


@pytest.mark.parametrize("change", [
    *(setter("files", 0, 0, to=name) for name in BAD_NAMES),
    *(setter("files", 0, 1, to=size) for size in (-1, 0, 10**30, "5", True, 1.0)),
    setter("files", 0, 2, to="0"), setter("files", 0, to=[]), setter("files", to={}), setter("files", to=[]),
    *(setter("sections", 0, place, to=value) for place in range(7) for value in (-1, 99, "x", [], None, [[0]], [["a", 1]])
      if (place, value) not in ((2, []), (3, "x"), (6, 99))),
    setter("sections", to=[]), setter("sections", 0, to=5), setter("version", to=2), setter("version", to=None),
])  # fmt: skip
def test_a_forged_index_is_refused_in_one_line(change: Callable[[dict[str, Any]], None], archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.ckz"
    path.write_bytes(forged(archive.read_bytes(), change))
    with pytest.raises(CheckpointError) as error:
        open_archive(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("data", [b"", MAGIC, MAGIC * 20, b"x" * 100, MAGIC + bytes(48) + MAGIC])
def test_a_file_that_is_none_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.ckz").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"begins as no|cut short or damaged|contradicts itself"):
        open_archive(tmp_path / "f.ckz")
    with pytest.raises(CheckpointError, match="expected a file"):
        open_archive(tmp_path)
