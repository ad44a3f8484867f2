"""checkpoint/whole_files.py: files that are there whole or as they were. End to end."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_files import small_files

from compresskit.checkpoint.whole_files import FORGOTTEN_SECONDS, whole_file, write_whole, write_whole_json, write_whole_tensors
from compresskit.errors import StorageError


def test_a_tensor_file_that_the_disk_does_not_take_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "states.safetensors"
    write_whole_tensors(file, {"states": torch.arange(6.0)})
    with small_files(1000), pytest.raises(StorageError, match=f"{file}: cannot be written .*; free some space"):
        write_whole_tensors(file, {"states": torch.zeros(6000)})
    assert torch.equal(load_file(file)["states"], torch.arange(6.0))
    assert list(tmp_path.iterdir()) == [file]
    write_whole_tensors(file, {"states": torch.zeros(6)})
    assert torch.equal(load_file(file)["states"], torch.zeros(6))


def test_a_text_file_that_the_disk_does_not_take_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    write_whole_json(file, {"steps": 1})
    with small_files(1000), pytest.raises(StorageError, match=f"{file}: cannot be written .*; free some space"):
        write_whole(file, "x" * 6000)
    assert file.read_text() == '{\n "steps": 1\n}\n'
    assert list(tmp_path.iterdir()) == [file]


def test_what_a_killed_process_left_is_removed_after_a_day_and_not_before(tmp_path: Path) -> None:
    file = tmp_path / "states.safetensors"
    old, young = tmp_path / "states.safetensors.1.new", tmp_path / "states.safetensors.2.new"
    for path in (old, young):
        path.touch()
    os.utime(old, (0, time.time() - FORGOTTEN_SECONDS - 1))
    write_whole_tensors(file, {"states": torch.zeros(2)})
    assert {path.name for path in tmp_path.iterdir()} == {file.name, young.name}


def test_a_file_that_others_write_takes_its_place_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with whole_file(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["m.gguf"]
