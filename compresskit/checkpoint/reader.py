"""Read a Hugging Face checkpoint folder lazily: configuration and tensor index first, weights one by one.

Opening a checkpoint does not import torch, so unusable input is refused in well under a second.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.small_files import (
    LARGEST_CONFIG_BYTES,
    check_regular,
    first_line,
    read_json,
    shown,
)
from compresskit.checkpoint.weight_files import INDEX, NAMED, weight_files
from compresskit.errors import CheckpointError, NumericalError, near_miss

if TYPE_CHECKING:
    from torch import Tensor

BYTES_PER_ELEMENT = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of each safetensors dtype."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The dtypes of weights; all others hold codes, shapes and masks."""
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
LARGEST_HEADER_BYTES = 1 << 24
"""Of one safetensors file: a hundred thousand tensors, far above every model's shard."""
LONGEST_TENSOR_NAME = 500
MOST_NUMBERS = 4096
"""Elements of a tensor that describes another: a shape has 2, the JSON of a bitsandbytes state some 200."""
MOST_HINTS = 20_000
"""Names that are compared for a near miss; each takes some 20 microseconds."""
HASH_CHUNK_BYTES = 1 << 22
FLOAT8_SECTION = 1 << 22
"""Elements that are looked at together."""


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as safetensors names it) and shape of one stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Stored size, without the header."""
        return self.elements * BYTES_PER_ELEMENT[self.dtype]


@dataclass(frozen=True)
class Stored:
    """What the files of a checkpoint hold, where its tensors are made from them on reading."""

    form: str
    """For people, such as "FP8, blocks of 128 x 128, read as BF16"."""
    tensors: Mapping[str, TensorSpec]
    """The stored tensors, in file order."""
    readers: Mapping[str, Callable[[], Tensor]]
    """By name, what makes a tensor; all others are stored as they are."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder; `tensors` is in file order."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    file_of: dict[str, Path]
    manifest: dict[str, Any] | None = field(default=None)
    stored: Stored | None = field(default=None)
    """What the files hold, if not these tensors. `file_of` then has the names of both."""

    @property
    def files(self) -> list[Path]:
        """The weight files, in order."""
        return list(dict.fromkeys(self.file_of.values()))

    @property
    def parameters(self) -> int:
        """Stored elements of all tensors; tied heads count once."""
        return sum(spec.elements for spec in self.tensors.values())

    @property
    def dtypes(self) -> set[str]:
        """Stored dtypes, as safetensors names them."""
        return {spec.dtype for spec in self.tensors.values()}

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def stored_as(self) -> str | None:
        """The form in which the files store some of the tensors; None where they hold all as they are read."""
        return self.stored.form if self.stored and self.file_of else None

    @property
    def stored_bytes(self) -> int:
        """Size of the tensors in the files, without headers; for a planned checkpoint, which has no files, of all tensors."""
        held = self.stored.tensors if self.stored and self.file_of else self.tensors
        return sum(spec.bytes for spec in held.values())

    def spec(self, name: str) -> TensorSpec:
        """Return dtype and shape of a stored tensor; raises CheckpointError if there is none."""
        if name not in self.tensors:
            hint = near_miss(name, itertools.islice(self.tensors, MOST_HINTS))
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; download the checkpoint again.{hint}")
        return self.tensors[name]

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """(rows, columns) of a stored tensor; raises CheckpointError if it has not two dimensions."""
        shape = self.spec(name).shape
        if len(shape) != 2:
            found = f"{self.file_of.get(name, self.folder)}: {name} has shape {list(shape)}"
            raise CheckpointError(f"{found}, expected two dimensions; download it again")
        return shape[0], shape[1]

    def read(self, name: str) -> Tensor:
        """Read one tensor, or make it from what the files hold.

        Returns:
            The tensor in the shape and dtype of its spec, on the CPU.

        Raises:
            CheckpointError: there is no such tensor, or the file was damaged after it was opened.
            NumericalError: the tensor holds NaN or infinity.
        """
        self.spec(name)
        path = self.file_of[name]
        made = self.stored.readers.get(name) if self.stored else None
        tensor = made() if made else _read(path, name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise NumericalError(f"{path}: {name} holds NaN or infinity; use an intact copy of the checkpoint")
        return tensor

    def read_slice(self, name: str, index: int) -> Tensor:
        """Read entry `index` of the first axis of a tensor; raises what `read` raises."""
        self.spec(name)
        path = self.file_of[name]
        made = self.stored.readers.get(name) if self.stored else None
        tensor = made()[index] if made else _read(path, name, index)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise NumericalError(f"{path}: {name} holds NaN or infinity; use an intact copy of the checkpoint")
        return tensor

    def read_numbers(self, name: str) -> list[int]:
        """Read a small integer tensor without importing torch, such as shapes and states that describe other tensors."""
        self.spec(name)
        leaf = name.rpartition(".")[2]
        if leaf not in self._numbers:
            self._numbers[leaf] = self._read_leaf(leaf)
        return self._numbers[leaf][name]

    def _read_leaf(self, leaf: str) -> dict[str, list[int]]:
        """Read all small integer tensors with this last part of the name, because opening a file takes milliseconds."""
        by_file: dict[Path, list[str]] = {}
        for name, spec in self.tensors.items():
            if name.rpartition(".")[2] != leaf:
                continue
            if spec.dtype not in INTEGERS or spec.elements > MOST_NUMBERS:
                raise CheckpointError(
                    f"{self.file_of[name]}: {name} is {spec.dtype} {list(spec.shape)}, expected a few whole numbers; "
                    "download it again"
                )
            by_file.setdefault(self.file_of[name], []).append(name)
        found: dict[str, list[int]] = {}
        for path, names in by_file.items():
            check_regular(path)
            try:
                with safe_open(path, framework="np") as file:
                    found |= {name: file.get_tensor(name).reshape(-1).tolist() for name in names}
            except Exception as error:  # safetensors raises its own kind, numpy others
                raise CheckpointError(f"{path}: {leaf} cannot be read ({first_line(error)}); download it again") from error
        return found

    @cached_property
    def _numbers(self) -> dict[str, dict[str, list[int]]]:
        """What `read_numbers` has read, by leaf and name."""
        return {}

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file, by file name."""
        return {file.name: sha256(file) for file in self.files}


def _read(path: Path, name: str, index: int | None = None) -> Tensor:
    """Read a tensor, or entry `index` of its first axis, from a file."""
    check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name) if index is None else file.get_slice(name)[index]
    except Exception as error:  # safetensors raises its own kind, torch others
        raise CheckpointError(f"{path}: {name} cannot be read ({first_line(error)}); download the file again") from error
    return tensor


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite. The extremes are NaN if any element is, and need no copy of the tensor."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # 8-bit floats have no comparisons; a copy in 32 bits would be four times as large
        flat = tensor.reshape(-1)
        sections = (flat[start : start + FLOAT8_SECTION] for start in range(0, len(flat), FLOAT8_SECTION))
        return all(bool(section.float().isfinite().all()) for section in sections)
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tensors_in(path: Path) -> list[TensorSpec]:
    """Read the header of a safetensors file; the library checks the offsets against the file size.

    Returns:
        Name, dtype and shape of every tensor, in file order.

    Raises:
        CheckpointError: the file is missing or damaged, or a dtype is not in `BYTES_PER_ELEMENT`.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: the shard is missing; download the checkpoint again")
    check_regular(path)
    try:
        with path.open("rb") as start:
            header_bytes = int.from_bytes(start.read(8), "little")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if header_bytes > LARGEST_HEADER_BYTES:
        raise CheckpointError(f"{path}: truncated or damaged (a header of {header_bytes:,} bytes); download the file again")
    try:
        with safe_open(path, framework="np") as file:
            slices = ((name, file.get_slice(name)) for name in file.offset_keys())
            specs = [TensorSpec(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices]
    except Exception as error:  # safetensors raises its own kind, a name that is no text others
        raise CheckpointError(f"{path}: truncated or damaged ({first_line(error)}); download the file again") from error
    for spec in specs:
        if not spec.name.isprintable() or not 0 < len(spec.name) <= LONGEST_TENSOR_NAME:
            raise CheckpointError(f"{path}: {shown(spec.name)} is no name of a tensor; download the file again")
        if spec.dtype not in BYTES_PER_ELEMENT:
            known = ", ".join(BYTES_PER_ELEMENT)
            raise CheckpointError(f"{path}: {spec.name} has dtype {spec.dtype}, known are {known}; convert it first")
    return specs


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; no weights are read.

    Returns:
        Configuration, tensor index, and the manifest if the folder has one.

    Raises:
        CheckpointError: the folder, its configuration, its index or a shard is missing or inconsistent.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a checkpoint folder, a Hub id or demo:smollm2-135m")
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "a PEFT adapter, not a model" if adapter else "has no config.json"
        raise CheckpointError(f"{folder}: {what}; point to the folder of a whole checkpoint")
    config = read_json(folder / "config.json", LARGEST_CONFIG_BYTES)
    files, weight_map = weight_files(folder, config.get(NAMED))
    tensors: dict[str, TensorSpec] = {}
    file_of: dict[str, Path] = {}
    for file in files:
        for spec in tensors_in(file):
            if spec.name in tensors:
                other = file_of[spec.name].name
                raise CheckpointError(f"{file}: holds {spec.name}, which {other} holds too; download the checkpoint again")
            tensors[spec.name] = spec
            file_of[spec.name] = file
    for name, file_name in weight_map.items():
        if name not in tensors or file_of[name].name != file_name:
            what = f"names {shown(name)} in {file_name}, which does not hold it"
            raise CheckpointError(f"{folder / INDEX}: {what}; download it again")
    return Checkpoint(folder, config, tensors, file_of, read_manifest(folder))
