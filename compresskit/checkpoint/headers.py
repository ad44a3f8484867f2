"""The header of a safetensors file: names, dtypes, shapes and places of its tensors, without torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from compresskit.checkpoint.byte_ranges import Stamp, stamp_of
from compresskit.checkpoint.small_files import check_regular, first_line, shown
from compresskit.errors import CheckpointError

BYTES_PER_ELEMENT = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element of the dtypes that stages read."""
STORED_BYTES = BYTES_PER_ELEMENT | {"F8_E8M0": 1, "U16": 2, "U32": 4, "U64": 8, "C64": 8}
"""Also of those that are only copied."""
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The dtypes of weights; all others hold codes, shapes and masks."""
LARGEST_HEADER_BYTES = 1 << 24
"""Of one safetensors file: a hundred thousand tensors, far above every model's shard."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header."""
LONGEST_TENSOR_NAME = 500


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
        return self.elements * STORED_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """Where the tensors of a safetensors file stand; `specs` and `starts` are by name, in file order."""

    stamp: Stamp
    """Of the file from which it was read."""
    specs: Mapping[str, TensorSpec]
    starts: Mapping[str, int]
    """First byte of each tensor in the file."""

    def start_of(self, spec: TensorSpec) -> int:
        """First byte of this tensor; raises ValueError if the file holds it in another form, or not at all."""
        if self.specs.get(spec.name) != spec:
            raise ValueError(f"the file changed after it was opened and holds no {spec.dtype} {list(spec.shape)} of this name")
        return self.starts[spec.name]


def tensors_in(path: Path) -> list[TensorSpec]:
    """Name, dtype and shape of every tensor of a safetensors file, in file order; raises what `read_header` raises."""
    return list(read_header(path).specs.values())


def read_header(path: Path, dtypes: Mapping[str, int] = BYTES_PER_ELEMENT) -> Header:
    """Read the header of a safetensors file; the library checks that its tensors fill the file without gaps.

    Returns:
        Every tensor and where it stands.

    Raises:
        CheckpointError: the file is missing or damaged, or a dtype is not in `dtypes`.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: the shard is missing; download the checkpoint again")
    check_regular(path)
    try:
        with path.open("rb") as start:
            stamp = stamp_of(start.fileno())
            header_bytes = int.from_bytes(start.read(LENGTH_BYTES), "little")
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
        if spec.dtype not in dtypes:
            known = ", ".join(dtypes)
            raise CheckpointError(f"{path}: {spec.name} has dtype {spec.dtype}, known are {known}; convert it first")
    starts = itertools.accumulate((spec.bytes for spec in specs), initial=LENGTH_BYTES + header_bytes)
    return Header(
        stamp, {spec.name: spec for spec in specs}, {spec.name: start for spec, start in zip(specs, starts, strict=False)}
    )
