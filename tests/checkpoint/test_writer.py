"""checkpoint/writer.py: stock readers agree (oracle), and a folder exists whole or not at all (property)."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from compresskit.checkpoint import writer as writing
from compresskit.checkpoint.folder import partial_folder
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import TensorSpec, open_checkpoint
from compresskit.checkpoint.writer import Writer, check_out, read_progress
from compresskit.errors import CheckpointError, NumericalError, RequestError

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.bias": torch.arange(5, dtype=torch.bfloat16),
    "c.scale": torch.tensor(2.5, dtype=torch.float16),
    "d.weight": torch.arange(30.0).view(5, 6).T,
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PLAN = [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"{ }\n")
    return folder


def write(out: Path, source: Path, shard_bytes: int = 10**9, names: tuple[str, ...] = tuple(reversed(TENSORS))) -> Writer:
    outputs = Outputs(PLAN, {"model_type": "llama"}, files={"note.py": "x = 1\n"})
    with Writer(out, outputs, shard_bytes, "key") as writer:
        writer.start(source)
        for name in names:
            writer.put(name, TENSORS[name])
        writer.finish_block(0, {"error": 0.5})
        writer.commit({"stage": "test"})
    return writer


@pytest.mark.parametrize("shard_bytes", [10**9, 60, 1])
def test_stock_safetensors_reads_back_what_was_written_in_any_order(shard_bytes: int, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    writer = write(out, source, shard_bytes)
    found = {name: tensor for shard in writer.shards for name, tensor in load_file(out / shard.name).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert list(open_checkpoint(out).tensors) == list(TENSORS)
    assert (out / "tokenizer.json").read_bytes() == b"{ }\n"
    assert not partial_folder(out).exists()
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444


def test_the_index_names_every_tensor_and_the_totals(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "out", source, 60)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_nothing_appears_when_a_tensor_is_missing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"never written, first d\.weight"):
        write(tmp_path / "out", source, names=("a.weight", "b.bias", "c.scale"))
    assert not (tmp_path / "out").exists()


def test_a_failure_removes_the_partial_folder_and_an_interruption_keeps_it(tmp_path: Path, source: Path) -> None:
    for error, stays in ((NumericalError, False), (KeyboardInterrupt, True)):
        with pytest.raises(error), Writer(tmp_path / "out", Outputs(PLAN, {}), 10**9, "key") as writer:
            writer.start(source)
            writer.finish_block(3, {"error": 0.5})
            raise error
        assert partial_folder(tmp_path / "out").exists() == stays
        assert not (tmp_path / "out").exists()
    progress = read_progress(tmp_path / "out", "key")
    assert progress is not None
    assert progress["blocks"] == [3]
    assert progress["facts"] == {"blocks": [{"error": 0.5}]}
    with pytest.raises(RequestError, match="drop --resume"):
        read_progress(tmp_path / "out", "another key")


def test_overwriting_replaces_the_old_folder(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    write(out, source)
    assert not (out / "old").exists()
    assert (out / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


def test_outputs_that_cannot_be_are_refused(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    refusals = [
        (source, False, "exists already"),
        (tmp_path / "file", True, "is a file"),
        (source / "deep" / "out", False, "inside the source"),
        (tmp_path, True, "contains the source"),
    ]
    for out, overwrite, said in refusals:
        with pytest.raises(RequestError, match=said):
            check_out(out, source, 10, overwrite)
    monkeypatch.setattr(writing, "SPARE_BYTES", 10**18)
    with pytest.raises(RequestError, match="GB free"):
        check_out(tmp_path / "out", source, 10, False)
