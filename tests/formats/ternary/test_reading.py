"""formats/ternary/reading.py: damage is named and never taken as right. Property, by mutation."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from ternary_files import KINDS, mutated, random_signs, read, small_file, write

from compresskit.errors import CheckpointError
from compresskit.formats.ternary.container import INDEX
from compresskit.formats.ternary.reading import Container, open_container


def test_stock_safetensors_opens_the_file(tmp_path: Path) -> None:
    write(tmp_path / "file", {"t": random_signs(100, 0.2)})
    with safe_open(tmp_path / "file", framework="np") as file:
        assert file.metadata()["format"] == "compresskit-ternary"
        assert file.get_tensor("magnitude").shape == (3,)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, dict[str, list[object]]]:
    """(a folder, a file in it, everything in that file)."""
    folder = tmp_path_factory.mktemp("damage")
    return folder, small_file(folder), read(folder / "original")


@pytest.mark.slow
@settings(max_examples=2000)
@given(st.sampled_from(KINDS), st.integers(0, 1 << 40), st.integers(0, 1 << 40))
def test_a_damaged_file_gives_the_original_or_a_clean_error(
    undamaged: tuple[Path, bytes, dict[str, list[object]]], kind: str, a: int, b: int
) -> None:
    folder, original, wanted = undamaged
    (folder / "damaged").write_bytes(mutated(original, kind, a, b))
    try:
        assert read(folder / "damaged") == wanted
    except CheckpointError as error:
        assert str(folder / "damaged") in str(error)
        assert "\n" not in str(error)


def payload_start(found: Container) -> int:
    return found.tensors["first"].start


def test_the_damaged_block_is_named(tmp_path: Path) -> None:
    data = bytearray(small_file(tmp_path))
    data[payload_start(open_container(tmp_path / "original")) + 3 * 8 + 900] ^= 4
    (tmp_path / "damaged").write_bytes(data)
    with pytest.raises(CheckpointError, match="first: block 1 is damaged"):
        list(open_container(tmp_path / "damaged").parts("first"))


def test_whole_sections_that_change_places_are_found(tmp_path: Path) -> None:
    """Two tensors of one size, whose blocks are intact where they are not wanted."""
    write(tmp_path / "file", {"a": random_signs(8192, 0.5, 1), "b": random_signs(8192, 0.5, 1) * np.int8(-1)}, "bitmask")
    found = open_container(tmp_path / "file")
    data = bytearray((tmp_path / "file").read_bytes())
    first, second = (data[e.start : e.start + e.bytes] for e in found.tensors.values())
    assert len(first) == len(second)
    data[found.tensors["a"].start : found.tensors["b"].start + len(second)] = second + first
    (tmp_path / "swapped").write_bytes(data)
    with pytest.raises(CheckpointError, match="a: block 0 is damaged"):
        list(open_container(tmp_path / "swapped").parts("a"))


def test_an_index_that_inflates_beyond_its_stated_size_is_refused(tmp_path: Path) -> None:
    from compresskit.formats.ternary.container import metadata_checksum

    data = small_file(tmp_path)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    start, end = header[INDEX]["data_offsets"]
    bomb = zlib.compress(b"[" * 300_000_000, 9)
    header[INDEX] |= {"shape": [len(bomb)], "data_offsets": [start, start + len(bomb)]}
    for stated in (1000, 1 << 27, 1 << 40):
        metadata = header["__metadata__"] | {"index_crc32": f"{zlib.crc32(bomb):08x}", "index_bytes": str(stated)}
        metadata["crc32"] = metadata_checksum(metadata)
        text = json.dumps(header | {"__metadata__": metadata}).encode()
        text += b" " * (-len(text) % 8)
        (tmp_path / "bomb").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size : 8 + size + start] + bomb)
        with pytest.raises(CheckpointError, match=r"the index|states an index"):
            open_container(tmp_path / "bomb")
    assert end > start
