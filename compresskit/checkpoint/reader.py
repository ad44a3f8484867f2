"""Read a Hugging Face checkpoint folder lazily: configuration and tensor index first, weights one by one.

Opening a checkpoint does not import torch, so unusable input is refused in well under a second.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint import digests
from compresskit.checkpoint.byte_ranges import Stamp, fill, stamp_of
from compresskit.checkpoint.digests import Digests, sha256
from compresskit.checkpoint.headers import BYTES_PER_ELEMENT, FLOATS, Header, TensorSpec, read_header, tensors_in
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

__all__ = ["BYTES_PER_ELEMENT", "FLOATS", "Checkpoint", "Stored", "TensorSpec", "open_checkpoint", "sha256", "tensors_in"]
"""With what callers know of a file's header."""

INTEGERS = {"I64": "q", "I32": "i", "I16": "h", "I8": "b", "U8": "B"}
"""Whole numbers, with the format characters of Python's `struct`."""
MOST_NUMBERS = 4096
"""Elements of a tensor that describes another: a shape has 2, the JSON of a bitsandbytes state some 200."""
MOST_HINTS = 20_000
"""Names that are compared for a near miss; each takes some 20 microseconds."""
FLOAT8_SECTION = 1 << 22
"""Elements that are looked at together."""


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
    headers: dict[Path, Header] = field(default_factory=dict, repr=False, compare=False)
    """The headers that were read, by weight file: to parse one takes milliseconds. Reading adds those that are missing."""
    digests: Digests = field(default_factory=dict, repr=False, compare=False)
    """SHA-256 of the weight files, known or being computed."""

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
            CheckpointError: there is no such tensor, or the file was damaged, replaced or removed after it was opened.
            NumericalError: the tensor holds NaN or infinity.
        """
        return self._finite(name, None)

    def read_slice(self, name: str, index: int) -> Tensor:
        """Read entry `index` of the first axis of a tensor; raises what `read` raises."""
        return self._finite(name, index)

    def _finite(self, name: str, index: int | None) -> Tensor:
        spec = self.spec(name)
        made = self.stored.readers.get(name) if self.stored else None
        if made:
            tensor = made() if index is None else made()[index]
        else:
            tensor = self._tensor(spec, index)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise NumericalError(f"{self.file_of[name]}: {name} holds NaN or infinity; use an intact copy of the checkpoint")
        return tensor

    def _tensor(self, spec: TensorSpec, index: int | None) -> Tensor:
        """A tensor, or entry `index` of its first axis, as it stands in its file."""
        import torch

        from compresskit.machine.precision import torch_dtype

        shape, skipped = spec.shape, 0
        if index is not None:
            if not shape or not 0 <= index < shape[0]:
                raise CheckpointError(f"{self.file_of[spec.name]}: {spec.name} has no entry {index}; download it again")
            shape = shape[1:]
            skipped = index * (spec.bytes // spec.shape[0])
        data = torch.empty(math.prod(shape) * BYTES_PER_ELEMENT[spec.dtype], dtype=torch.uint8)
        self._fill(data.numpy().data, spec, skipped)
        return data.view(torch_dtype(spec.dtype)).reshape(shape)

    def read_numbers(self, name: str) -> list[int]:
        """Read a small integer tensor without importing torch, such as shapes and states that describe other tensors."""
        spec = self.spec(name)
        if spec.dtype not in INTEGERS or spec.elements > MOST_NUMBERS:
            what = f"{name} is {spec.dtype} {list(spec.shape)}, expected a few whole numbers"
            raise CheckpointError(f"{self.file_of[name]}: {what}; download it again")
        data = bytearray(spec.bytes)
        self._fill(memoryview(data), spec, 0)
        return list(struct.unpack(f"<{spec.elements}{INTEGERS[spec.dtype]}", data))

    def _fill(self, data: memoryview, spec: TensorSpec, skipped: int) -> None:
        """Fill `data` with a tensor's bytes, from the byte `skipped` on."""
        path = self.file_of[spec.name]
        check_regular(path)
        try:
            with path.open("rb", buffering=0) as file:
                start = self._header(path, stamp_of(file.fileno())).start_of(spec)
                fill(file.fileno(), start + skipped, data)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise CheckpointError(f"{path}: {spec.name} cannot be read ({reason}); download the file again") from error

    def _header(self, path: Path, stamp: Stamp) -> Header:
        """The header of a file that has this stamp now; it is read again only if the file has changed."""
        known = self.headers.get(path)
        if known is None or known.stamp != stamp:
            if known is not None and known.stamp.is_another(stamp):
                raise ValueError("the file was replaced after it was opened")
            known = self.headers[path] = read_header(path)
        return known

    @property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of every weight file, by file name; each is computed once."""
        missing = [file for file in self.files if file not in self.digests]
        if missing:
            digests.begin(self.digests, missing)
        return {file.name: self.digests[file].result() for file in self.files}


def _is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite. The extremes are NaN if any element is, and need no copy of the tensor."""
    if tensor.numel() == 0:
        return True
    if tensor.dtype.itemsize == 1:  # 8-bit floats have no comparisons; a copy in 32 bits would be four times as large
        flat = tensor.reshape(-1)
        sections = (flat[start : start + FLOAT8_SECTION] for start in range(0, len(flat), FLOAT8_SECTION))
        return all(bool(section.float().isfinite().all()) for section in sections)
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def open_checkpoint(folder: Path) -> Checkpoint:
    """Open a checkpoint folder; no weights are read.

    Returns:
        Configuration, tensor index, and the manifest if the folder has one.

    Raises:
        CheckpointError: the folder, its configuration, its index or a shard is missing or inconsistent.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file, expected a checkpoint folder; compresskit expand makes one of a .ckz file")
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
    headers = {file: read_header(file) for file in files}
    for file, header in headers.items():
        for spec in header.specs.values():
            if spec.name in tensors:
                other = file_of[spec.name].name
                raise CheckpointError(f"{file}: holds {spec.name}, which {other} holds too; download the checkpoint again")
            tensors[spec.name] = spec
            file_of[spec.name] = file
    for name, file_name in weight_map.items():
        if name not in tensors or file_of[name].name != file_name:
            what = f"names {shown(name)} in {file_name}, which does not hold it"
            raise CheckpointError(f"{folder / INDEX}: {what}; download it again")
    return Checkpoint(folder, config, tensors, file_of, read_manifest(folder), headers=headers)
