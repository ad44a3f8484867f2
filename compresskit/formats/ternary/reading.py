"""Open a ternary task vector's file and decode its sections; any damage is detected and named.

Checks run in this order: the safetensors header against the file size (by the library), the metadata against its CRC, the
index against its CRC and stated size, every index entry against the payload size, every block against its CRC.
The file size bounds the memory: a block of 8,192 entries takes at least 8 bytes.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.checkpoint.reader import BYTES_PER_ELEMENT, TensorSpec, tensors_in
from compresskit.checkpoint.small_files import first_line, json_value, shown
from compresskit.errors import CheckpointError
from compresskit.formats.ternary.container import FORMAT, INDEX, PAYLOAD, VERSION, Facts, Part, metadata_checksum
from compresskit.formats.ternary.golomb import LARGEST_RICE
from compresskit.formats.ternary.sections import BLOCK, ROW, SECTION, Section, decode, entries_of_sections

MOST_INDEX_BYTES = 1 << 26
MOST_INFLATION = 1100
"""Upper bound on zlib's expansion (1,032 : 1)."""
VARIANTS = ("compeft", "stc", "prune")
KEEPS_VALUES = "prune"
CODINGS = ("auto", "golomb", "bitmask")
FLOATS = ("F32", "F16", "BF16", "F64")
"""Dtypes of ternary tensors."""
AGAIN = "get an intact copy of the file"


@dataclass(frozen=True)
class Entry:
    """One ternary tensor in an opened file."""

    number: int
    spec: TensorSpec
    scale: float
    offset: float
    start: int
    """Position of its first section in the file."""
    sections: tuple[Section, ...]

    @property
    def nonzeros(self) -> int:
        """Number of non-zero entries."""
        return sum(section.nonzeros for section in self.sections)

    @property
    def bytes(self) -> int:
        """Stored bytes, including block tables."""
        return sum(section.bytes for section in self.sections)


@dataclass(frozen=True)
class Container:
    """An opened file; nothing is decoded yet."""

    path: Path
    facts: Facts
    tensors: dict[str, Entry]
    dense: dict[str, TensorSpec]
    dense_spans: dict[str, tuple[int, int, int]]
    """Name -> (first byte in the file, bytes, CRC-32)."""

    @property
    def entries(self) -> int:
        """Number of entries in all ternary tensors."""
        return sum(entry.spec.elements for entry in self.tensors.values())

    @property
    def nonzeros(self) -> int:
        """Number of non-zero entries in all ternary tensors."""
        return sum(entry.nonzeros for entry in self.tensors.values())

    def parts(self, name: str) -> Iterator[Part]:
        """Decode a tensor's flat sections in order; CheckpointError names the damaged tensor and block."""
        entry = self.tensors[name]
        place = entry.start
        sizes = entries_of_sections(entry.spec.elements)
        with self.path.open("rb") as file:
            for number, (section, entries) in enumerate(zip(entry.sections, sizes, strict=True)):
                file.seek(place)
                body = file.read(section.bytes)
                where = (entry.number, number * (SECTION // BLOCK))
                part = Part(*decode(body, section, entries, where, f"{self.path}: {name}"))
                kept = section.nonzeros * BYTES_PER_ELEMENT[entry.spec.dtype]
                if len(part.values) != kept and (part.values or self.facts.variant == KEEPS_VALUES):
                    what = f"{len(part.values)} bytes of values, {section.nonzeros} entries are kept"
                    raise CheckpointError(f"{self.path}: {name}: {what}; {AGAIN}")
                yield part
                place += section.bytes

    def dense_bytes(self, name: str) -> bytes:
        """Read a dense tensor's bytes; raises CheckpointError if they are damaged."""
        start, size, crc = self.dense_spans[name]
        with self.path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) != size or zlib.crc32(data) != crc:
            raise CheckpointError(f"{self.path}: {name}: the dense tensor is damaged; {AGAIN}")
        return data


def open_container(path: Path) -> Container:
    """Open a file and check its header and index.

    Returns:
        The facts of the vector and the positions of its sections; nothing is decoded.

    Raises:
        CheckpointError: the file is damaged, written by a newer version, or of another kind.
    """
    tensors_in(path)
    header, data_start = _header(path)
    metadata = header.get("__metadata__") or {}
    if metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path}: holds no ternary task vector; make one with compresskit quantize compeft")
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{path}: format version {shown(metadata.get('version'))}, this release reads {VERSION}; update compresskit"
        )
    if metadata.get("crc32") != metadata_checksum(metadata):
        raise CheckpointError(f"{path}: the header is damaged; {AGAIN}")
    facts = _facts(path, metadata)
    spans = {name: (data_start + e["data_offsets"][0], data_start + e["data_offsets"][1]) for name, e in header.items()
             if name != "__metadata__"}  # fmt: skip
    if not {PAYLOAD, INDEX} <= spans.keys():
        raise CheckpointError(f"{path}: has no {PAYLOAD} or no {INDEX}; {AGAIN}")
    index = _index(path, spans.pop(INDEX), metadata)
    try:
        tensors = _entries(index["tensors"], *spans.pop(PAYLOAD))
        rows = {name: (TensorSpec(name, dtype, tuple(shape)), crc) for name, dtype, shape, crc in index["dense"]}
        right = rows.keys() == spans.keys() and all(_fits(spec, spans[name]) for name, (spec, _) in rows.items())
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}: the index contradicts itself or the file ({first_line(error)}); {AGAIN}") from error
    if not right or tensors.keys() & rows.keys():
        raise CheckpointError(f"{path}: the header contradicts the index; {AGAIN}")
    dense = {name: (spans[name][0], spec.bytes, crc) for name, (spec, crc) in rows.items()}
    return Container(path, facts, tensors, {name: spec for name, (spec, _) in rows.items()}, dense)


def _fits(spec: TensorSpec, span: tuple[int, int]) -> bool:
    """Whether a dense tensor of the index is what lies in the file; raises KeyError or TypeError for what is no tensor."""
    return all(type(size) is int and size >= 0 for size in spec.shape) and spec.bytes == span[1] - span[0]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Return (the header that the library has accepted, the position where the data begin)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        try:
            header: dict[str, Any] = json_value(file.read(length).decode())
        except ValueError as error:
            raise CheckpointError(f"{path}: the header is damaged; {AGAIN}") from error
    return header, 8 + length


def _facts(path: Path, metadata: dict[str, str]) -> Facts:
    """Read the facts of the whole vector from metadata with a valid CRC."""
    try:
        found = {key: metadata[key] for key in ("variant", "coding", "base")}
        numbers = {key: float(metadata[key]) for key in ("density", "alpha")}
        if found["variant"] not in VARIANTS or found["coding"] not in CODINGS or int(metadata["block_length"]) != BLOCK:
            raise ValueError(f"variant {found['variant']}, coding {found['coding']}, blocks of {metadata['block_length']}")
        if not all(map(math.isfinite, numbers.values())) or not re.fullmatch("|[0-9a-f]{64}", found["base"]):
            raise ValueError(f"{numbers}, base {found['base']}")
    except (KeyError, ValueError) as error:
        what = f"the metadata say what this release does not know ({first_line(error)})"
        raise CheckpointError(f"{path}: {what}; update compresskit") from error
    return Facts(**found, **numbers, balanced=metadata.get("balanced") == "True")  # type: ignore[arg-type]


def _index(path: Path, span: tuple[int, int], metadata: dict[str, str]) -> dict[str, Any]:
    """Unpack the index, limited to its stated size and to zlib's maximum expansion."""
    packed_bytes = span[1] - span[0]
    stated = metadata.get("index_bytes", "")
    size = int(stated) if re.fullmatch("[0-9]{1,12}", stated) else -1
    if not 0 <= size <= min(MOST_INDEX_BYTES, MOST_INFLATION * packed_bytes):
        raise CheckpointError(f"{path}: states an index of {shown(stated)} bytes, which {packed_bytes} cannot hold; {AGAIN}")
    with path.open("rb") as file:
        file.seek(span[0])
        packed = file.read(packed_bytes)
    if f"{zlib.crc32(packed):08x}" != metadata.get("index_crc32"):
        raise CheckpointError(f"{path}: the index is damaged; {AGAIN}")
    try:
        text = zlib.decompressobj().decompress(packed, size + 1)
        if len(text) != size:
            raise ValueError(f"{len(text)} bytes instead of {size}")
        index: dict[str, Any] = json_value(text.decode())
    except (zlib.error, ValueError) as error:
        raise CheckpointError(f"{path}: the index cannot be unpacked ({first_line(error)}); {AGAIN}") from error
    return index


def _entries(rows: list[dict[str, Any]], start: int, end: int) -> dict[str, Entry]:
    """Read the index's tensors; raises ValueError if one contradicts itself or the payload (the file from start to end)."""
    found = {}
    for number, row in enumerate(rows):
        spec = TensorSpec(row["name"], row["dtype"], tuple(row["shape"]))
        named = isinstance(spec.name, str) and spec.name.isprintable()
        if not named or spec.dtype not in FLOATS or any(type(n) is not int or n < 0 for n in spec.shape):
            raise ValueError(f"{shown(spec.name)} is {shown(spec.dtype)} {shown(spec.shape)}")
        sections = tuple(Section(*each) for each in row["sections"])
        if len(sections) != -(-spec.elements // SECTION):
            raise ValueError(f"{spec.name} has {len(sections)} sections")
        for section, entries in zip(sections, entries_of_sections(spec.elements), strict=True):
            _check(spec.name, section, entries, end - start)
        scale, offset = float(row["scale"]), float(row["offset"])
        if not (math.isfinite(scale) and math.isfinite(offset)):
            raise ValueError(f"{spec.name} has scale {scale}")
        found[spec.name] = Entry(number, spec, scale, offset, start, sections)
        start += found[spec.name].bytes
    if start != end or len(found) != len(rows):
        raise ValueError("the sections do not fill the payload")
    return found


def _check(name: str, section: Section, entries: int, most_bytes: int) -> None:
    table = ROW.itemsize * -(-entries // BLOCK)
    numbers = all(type(number) is int for number in section[1:])
    right = numbers and section.coding in ("golomb", "bitmask") and 0 <= section.rice <= LARGEST_RICE
    if not right or not table <= section.bytes <= most_bytes or not 0 <= section.nonzeros <= entries:
        raise ValueError(f"{name} has a section {shown(list(section))}")
