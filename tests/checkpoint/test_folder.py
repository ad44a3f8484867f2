"""Files that are there whole or as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compresskit.checkpoint.folder import write_whole_tensors


def test_a_tensor_file_that_could_not_be_written_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "states.safetensors"
    write_whole_tensors(file, {"states": torch.arange(6.0)})

    def disk_full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_whole_tensors(file, {"states": torch.zeros(6)})
    monkeypatch.undo()
    assert torch.equal(load_file(file)["states"], torch.arange(6.0))
    assert list(tmp_path.iterdir()) == [file]
    write_whole_tensors(file, {"states": torch.zeros(6)})
    assert torch.equal(load_file(file)["states"], torch.zeros(6))
