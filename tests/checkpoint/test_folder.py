"""checkpoint/folder.py: files that are there whole or as they were. End to end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from small_files import small_files

from compresskit.checkpoint.folder import write_whole_tensors
from compresskit.errors import CheckpointError


def test_a_tensor_file_that_the_disk_does_not_take_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "states.safetensors"
    write_whole_tensors(file, {"states": torch.arange(6.0)})
    with small_files(1000), pytest.raises(CheckpointError, match=f"{file}: cannot be written .*; free some space"):
        write_whole_tensors(file, {"states": torch.zeros(6000)})
    assert torch.equal(load_file(file)["states"], torch.arange(6.0))
    assert list(tmp_path.iterdir()) == [file]
    write_whole_tensors(file, {"states": torch.zeros(6)})
    assert torch.equal(load_file(file)["states"], torch.zeros(6))
