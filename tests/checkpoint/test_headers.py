"""checkpoint/headers.py, checkpoint/byte_ranges.py, checkpoint/reader.py: tensors by position, and files that change.

Oracle tests against safetensors' own reader, and damage after opening.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compresskit.checkpoint import headers, reader
from compresskit.checkpoint.reader import BYTES_PER_ELEMENT, open_checkpoint
from compresskit.errors import CheckpointError
from compresskit.machine.precision import torch_dtype

SHAPES = {"matrix": (3, 5), "vector": (7,), "scalar": (), "empty": (0, 4), "stack": (3, 2, 5)}


def random_bytes(seed: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


@pytest.fixture
def every_dtype(tmp_path: Path) -> Path:
    """A folder with two files that hold every shape in every dtype."""
    (tmp_path / "config.json").write_text("{}")
    for number, count in ((1, 0), (2, 1)):
        tensors = {
            f"{name}.{shape}.{number}": random_bytes(31 * count + seed, torch_dtype(name), SHAPES[shape])
            for seed, name in enumerate(BYTES_PER_ELEMENT)
            for shape in SHAPES
        }
        save_file(tensors, tmp_path / f"model-0000{number}-of-00002.safetensors")
    return tmp_path


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_every_dtype_and_shape_is_read_as_safetensors_reads_it(every_dtype: Path) -> None:
    store = open_checkpoint(every_dtype)
    expected = {name: tensor for file in store.files for name, tensor in load_file(file).items()}
    assert store.tensors.keys() == expected.keys()
    assert {spec.dtype for spec in store.tensors.values()} == set(BYTES_PER_ELEMENT)
    for name, tensor in expected.items():
        found = store.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(bits(found), bits(tensor))


def test_every_entry_of_the_first_axis_is_read_as_safetensors_reads_it(every_dtype: Path) -> None:
    store = open_checkpoint(every_dtype)
    for file in store.files:
        for name, tensor in load_file(file).items():
            for index in range(len(tensor) if tensor.ndim else 0):
                found = store.read_slice(name, index)
                assert found.shape == tensor[index].shape
                assert torch.equal(bits(found), bits(tensor[index]))


def test_whole_numbers_are_read_without_torch(every_dtype: Path) -> None:
    store = open_checkpoint(every_dtype)
    tensors = load_file(store.files[0])
    for dtype in ("I64", "I32", "I16", "I8", "U8"):
        assert store.read_numbers(f"{dtype}.matrix.1") == tensors[f"{dtype}.matrix.1"].reshape(-1).tolist()
    with pytest.raises(CheckpointError, match=r"F32\.matrix\.1 is F32 \[3, 5\]"):
        store.read_numbers("F32.matrix.1")


@pytest.mark.parametrize("index", [-1, 3])
def test_an_entry_that_is_not_there_is_refused(index: int, every_dtype: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"F32\.matrix\.1 has no entry {index}"):
        open_checkpoint(every_dtype).read_slice("F32.matrix.1", index)


def test_a_header_is_read_once(every_dtype: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Path] = []
    plain = headers.read_header
    monkeypatch.setattr(reader, "read_header", lambda path: (parsed.append(path), plain(path))[1])
    store = open_checkpoint(every_dtype)
    for name in store.tensors:
        store.read(name)
    assert parsed == store.files


def test_no_descriptor_stays_open(every_dtype: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    store = open_checkpoint(every_dtype)
    for name in store.tensors:
        store.read(name)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 3)


def cut_within_the_header(path: Path) -> None:
    os.truncate(path, 20)


def overwritten(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(1, 1))
    other.replace(path)


def without_the_tensor(path: Path) -> None:
    save_file({"other": torch.zeros(2)}, path)


def of_another_shape(path: Path) -> None:
    path.unlink()
    save_file({"weight": torch.zeros(5, 3)}, path)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut_short, "truncated or damaged"),
    "cut within the header": (cut_within_the_header, "truncated or damaged"),
    "overwritten": (overwritten, "truncated or damaged"),
    "replaced by a copy": (replaced, "weight cannot be read (the file was replaced after it was opened)"),
    "another file": (without_the_tensor, "weight cannot be read (the file"),
    "another shape": (of_another_shape, "weight cannot be read (the file"),
    "removed": (Path.unlink, "cannot be read (No such file or directory)"),
    "a pipe": (a_pipe, "is a pipe or a device"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("read_before", [True, False])
def test_a_file_that_changes_after_it_was_opened_is_refused_in_one_line(read_before: bool, damage: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.ones(3, 5)}, path)
    store = open_checkpoint(tmp_path)
    if read_before:
        store.read("weight")
    change, said = DAMAGES[damage]
    change(path)
    with pytest.raises(CheckpointError) as caught:
        store.read("weight")
    assert said in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_written_in_place_is_read_as_it_is_now(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.ones(3, 5)}, path)
    store = open_checkpoint(tmp_path)
    with path.open("r+b") as file:
        file.seek(-60, os.SEEK_END)
        file.write(torch.full((3, 5), 2.0).numpy().tobytes())
    assert torch.equal(store.read("weight"), torch.full((3, 5), 2.0))


def test_a_file_that_ends_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stamp is that of the whole file: it is cut between the look at it and the reading."""
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text("{}")
    save_file({"weight": torch.ones(3, 5)}, path)
    store = open_checkpoint(tmp_path)
    whole = store.headers[path].stamp
    cut_short(path)
    monkeypatch.setattr(reader, "stamp_of", lambda file: whole)
    with pytest.raises(CheckpointError, match=r"weight cannot be read \(it ends at byte .*, 3 bytes too early"):
        store.read("weight")
