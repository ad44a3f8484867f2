"""checkpoint/writer.py: stock readers agree (oracle), and unfinished output is resumed as it was left (property)."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from dying_children import dying_at
from safetensors.torch import load_file

from compresskit.checkpoint.folder import held, settle
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import TensorSpec, open_checkpoint
from compresskit.checkpoint.work_folder import WorkFolder, read_progress
from compresskit.checkpoint.writer import Writer
from compresskit.errors import CheckpointError, NumericalError, RequestError

TENSORS = {
    "a.weight": torch.arange(12.0).view(3, 4),
    "b.bias": torch.arange(5, dtype=torch.bfloat16),
    "c.scale": torch.tensor(2.5, dtype=torch.float16),
    "d.weight": torch.arange(30.0).view(5, 6).T,
}
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PLAN = [TensorSpec(name, DTYPES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()]
OURS = {"tool": "compresskit"}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(b"{ }\n")
    return folder


def write(out: Path, source: Path, shard_bytes: int = 10**9, names: tuple[str, ...] = tuple(reversed(TENSORS))) -> Writer:
    outputs = Outputs(PLAN, {"model_type": "llama"}, files={"note.py": "x = 1\n"})
    with held(out, overwrite=True) as work:
        writer = Writer(work, outputs, shard_bytes, lambda: "key")
        writer.start(source)
        for name in names:
            writer.put(name, TENSORS[name])
        writer.finish_block(0, {"error": 0.5})
        writer.commit(OURS)
    return writer


@pytest.mark.parametrize("shard_bytes", [10**9, 60, 1])
def test_stock_safetensors_reads_back_what_was_written_in_any_order(shard_bytes: int, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    writer = write(out, source, shard_bytes)
    found = {name: tensor for shard in writer.shards for name, tensor in load_file(out / shard.name).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert list(open_checkpoint(out).tensors) == list(TENSORS)
    assert (out / "tokenizer.json").read_bytes() == b"{ }\n"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_may_be_read_by_those_whom_the_umask_allows(mask: int, tmp_path: Path, source: Path) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "out", source)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_the_index_names_every_tensor_and_the_totals(tmp_path: Path, source: Path) -> None:
    write(tmp_path / "out", source, 60)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in TENSORS.values())


def test_nothing_appears_when_a_tensor_is_missing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(CheckpointError, match=r"never written, first d\.weight"):
        write(tmp_path / "out", source, names=("a.weight", "b.bias", "c.scale"))
    assert not (tmp_path / "out").exists()


def test_only_a_failure_that_would_come_again_removes_finished_blocks(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    for error, stays in ((NumericalError, False), (CheckpointError, True), (OSError, True), (KeyboardInterrupt, True)):
        with pytest.raises(error), held(out, overwrite=False) as work:
            writer = Writer(work, Outputs(PLAN, {}), 10**9, lambda: "key")
            writer.start(source)
            writer.finish_block(3, {"error": 0.5})
            raise error
        assert WorkFolder(out).path.exists() == stays
        assert not out.exists()
    progress = read_progress(WorkFolder(out), "key")
    assert progress is not None
    assert progress["blocks"] == [3]
    assert progress["facts"] == {"blocks": [{"error": 0.5}]}
    with pytest.raises(RequestError, match="drop --resume"):
        read_progress(WorkFolder(out), "another key")


def interrupted(out: Path, source: Path) -> None:
    with pytest.raises(KeyboardInterrupt), held(out, overwrite=False) as work:
        writer = Writer(work, Outputs(PLAN, {"model_type": "llama"}), 10**9, lambda: "key")
        writer.start(source)
        for name in list(TENSORS)[:2]:
            writer.put(name, TENSORS[name])
        writer.finish_block(0, {})
        raise KeyboardInterrupt


def test_a_resumed_writer_misses_only_the_rest_and_writes_the_small_files_again(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, source)
    for name in ("config.json", "tokenizer.json", "compresskit.json"):
        (WorkFolder(out).result / name).write_bytes(b"")
    with held(out, overwrite=False, resume=True) as work:
        progress = read_progress(work, "key")
        assert progress is not None
        writer = Writer(work, Outputs(PLAN, {"model_type": "llama"}), 10**9, lambda: "key")
        writer.resume(source, progress)
        assert (writer.done, writer.missing) == ([0], set(list(TENSORS)[2:]))
        assert open_checkpoint(writer.partial).manifest is None
        for name in list(TENSORS)[2:]:
            writer.put(name, TENSORS[name])
        writer.commit(OURS)
    found = load_file(out / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert json.loads((out / "config.json").read_text()) == {"model_type": "llama"}
    assert (out / "tokenizer.json").read_bytes() == b"{ }\n"


@pytest.mark.parametrize("damage", ["shorter", "gone"])
def test_a_shard_that_is_not_as_it_was_left_is_not_resumed(damage: str, tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    interrupted(out, source)
    shard = WorkFolder(out).result / "model.safetensors"
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(RequestError, match="not as it was left; start again, without --resume"), held(out, False, True) as work:
        Writer(work, Outputs(PLAN, {"model_type": "llama"}), 10**9, lambda: "key").resume(
            source, read_progress(work, "key") or {}
        )
    write(out, source)
    assert out.is_dir()


def complete(out: Path, source: Path) -> None:
    """What a stage does: it resumes where it can, and looks at its own result before it commits it."""
    outputs = Outputs(PLAN, {"model_type": "llama"}, files={"note.py": "x = 1\n"})
    with held(out, overwrite=True, resume=True) as work:
        writer = Writer(work, outputs, 10**9, lambda: "key")
        progress = read_progress(work, "key")
        if progress:
            writer.resume(source, progress)
        else:
            writer.start(source)
        for name in writer.missing & set(TENSORS):
            writer.put(name, TENSORS[name])
        writer.finish_block(len(writer.done), {})
        writer.write_text("adapter/adapter_config.json", "{}")
        assert open_checkpoint(writer.partial).manifest is None
        writer.commit(OURS)


@pytest.mark.slow
def test_killed_at_any_step_a_writer_is_resumed_and_leaves_nothing_half_written(tmp_path: Path, source: Path) -> None:
    """Also just after a file was made, and before anything was in it."""
    out = tmp_path / "out"
    for step in range(1, 100):
        came_to_its_end = dying_at(step, lambda: complete(out, source))
        if not out.exists():
            complete(out, source)
        found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert found == {
            "model.safetensors", "config.json", "tokenizer.json", "note.py", "compresskit.json", "adapter/adapter_config.json"
        }  # fmt: skip
        assert json.loads((out / "compresskit.json").read_text()) == OURS | {"request": "key"}
        assert (out / "adapter" / "adapter_config.json").read_text() == "{}"
        assert all(torch.equal(load_file(out / "model.safetensors")[name], TENSORS[name]) for name in TENSORS)
        settle(out)
        assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}
        shutil.rmtree(out)
        if came_to_its_end:
            break
    assert came_to_its_end
