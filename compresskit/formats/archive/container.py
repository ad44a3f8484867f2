"""The file of an archive: a magic number, the sections one after the other, the index, and where that is.

    magic       8 bytes; a transfer that changes line ends changes it
    sections    see sections.py
    index       JSON in zstd: name, bytes and SHA-256 of every file, and every section's entry
    end         bytes of the packed index, bytes of the index (8 each), SHA-256 of the index (32), the magic again

The index comes last, so that writing takes one pass. Reading checks every number of it against the file's size, and that the
sections make every byte of every file once, before anything is decoded.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from compresskit import __version__
from compresskit.checkpoint.small_files import check_regular, first_line, inside, json_value, shown
from compresskit.errors import CheckpointError
from compresskit.formats.archive.coding import AS_IT_IS, SMALLEST, ZSTD, coded, decoded
from compresskit.formats.archive.sections import Section, fault

MAGIC = b"\x93CKZ\r\n\x1a\n"
ENDING = ".ckz"
VERSION = 1
END = struct.Struct("<QQ32s8s")
MOST_INDEX_BYTES = 1 << 26
AGAIN = "get an intact copy of the file"


@dataclass(frozen=True)
class ArchivedFile:
    """One file of the folder."""

    name: str
    """Its path in the folder, with `/`."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Archive:
    """An opened archive; nothing is decoded yet."""

    path: Path
    files: tuple[ArchivedFile, ...]
    sections: tuple[Section, ...]
    tool: str
    """Version that wrote it."""
    digest: str
    """SHA-256 of the index, which names the content: it holds the digest of every file."""

    @property
    def bytes(self) -> int:
        """Size of the folder's files."""
        return sum(file.bytes for file in self.files)

    def starts(self) -> list[int]:
        """Position of every section in the archive."""
        position, found = len(MAGIC), []
        for section in self.sections:
            found.append(position)
            position += section.stored
        return found


def by_kind(sections: Sequence[Section]) -> dict[str, dict[str, int]]:
    """Bytes in the folder and in the archive (`stored`) of what the sections hold, by label."""
    found: dict[str, dict[str, int]] = {}
    for section in sections:
        kind = found.setdefault(section.label, {"bytes": 0, "stored": 0})
        kind["bytes"] += section.bytes
        kind["stored"] += section.stored
    return found


def write_index(file: BinaryIO, files: Sequence[ArchivedFile], sections: Sequence[Section]) -> None:
    """Write what follows the sections."""
    rows = [[s.file, s.kind, list(s.parameters), s.label, [list(p) for p in s.places], s.stored, s.crc] for s in sections]
    found = {"version": VERSION, "tool": __version__, "files": [[f.name, f.bytes, f.sha256] for f in files], "sections": rows}
    text = json.dumps(found, separators=(",", ":")).encode()
    coding, packed = coded(text, SMALLEST)
    file.write(packed)
    file.write(END.pack(len(packed), len(text) if coding == ZSTD else 0, hashlib.sha256(text).digest(), MAGIC))


def open_archive(path: Path) -> Archive:
    """Open an archive and check its index.

    Returns:
        The archive, whose sections make every file.

    Raises:
        CheckpointError: the file is no archive, of a later version, or damaged.
    """
    size = check_regular(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            if start != MAGIC:
                raise CheckpointError(f"{path}: begins as no {ENDING} archive does; give the file that compresskit pack wrote")
            text, end = _index_text(file, size)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: cut short or damaged ({first_line(error)}); {AGAIN}") from error
    try:
        found = json_value(text.decode())
        if type(found) is dict and found.get("version") != VERSION:
            raise CheckpointError(f"{path}: is an archive of version {shown(found.get('version'))}; update compresskit")
        files = tuple(_file(path, row) for row in found["files"])
        sections = tuple(_section(row) for row in found["sections"])
        _check(files, sections, end - len(MAGIC))
        tool = str(found["tool"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path}: the index contradicts itself or the file ({first_line(error)}); {AGAIN}") from error
    return Archive(path, files, sections, tool, hashlib.sha256(text).hexdigest())


def _index_text(file: BinaryIO, size: int) -> tuple[bytes, int]:
    """Return (the index's text, where the sections end); raises ValueError in a few words where it is damaged."""
    file.seek(max(0, size - END.size))
    end = file.read(END.size)
    if len(end) != END.size or size < len(MAGIC) + END.size:
        raise ValueError("it ends before its index")
    packed_bytes, text_bytes, digest, magic = END.unpack(end)
    if magic != MAGIC or max(packed_bytes, text_bytes) > MOST_INDEX_BYTES:
        raise ValueError("its end is missing")
    start = size - END.size - packed_bytes
    if start < len(MAGIC):
        raise ValueError("its index is longer than the file")
    file.seek(start)
    packed = file.read(packed_bytes)
    try:
        text = bytes(decoded(ZSTD, packed, text_bytes) if text_bytes else decoded(AS_IT_IS, packed, packed_bytes))
    except CheckpointError as error:
        raise ValueError(f"its index: {error}") from error
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("the checksum of its index is wrong")
    return text, start


def _file(path: Path, row: list[Any]) -> ArchivedFile:
    name, size, digest = row
    inside(path.parent, name, path, subfolders=True)
    if type(size) is not int or size < 0 or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{shown(name)} has {shown(size)} bytes and SHA-256 {shown(digest)}")
    return ArchivedFile(name, size, digest)


def _section(row: list[Any]) -> Section:
    number, kind, parameters, label, places, stored, crc = row
    pairs = tuple((start, length) for start, length in places)
    whole = [number, stored, crc, *parameters, *(each for pair in pairs for each in pair)]
    if any(type(each) is not int or each < 0 for each in whole) or type(kind) is not str or type(label) is not str:
        raise ValueError(f"a section is {shown(row)}")
    section = Section(number, kind, tuple(parameters), label, pairs, stored, crc)
    if what := fault(section):
        raise ValueError(f"a section's {what} is {shown(row)}")
    return section


def _check(files: tuple[ArchivedFile, ...], sections: tuple[Section, ...], stored: int) -> None:
    """Raise ValueError unless the sections fill the archive and every file, and no name stands for two files."""
    if sum(section.stored for section in sections) != stored:
        raise ValueError("its sections do not fill it")
    for one, other in pairwise(sorted(file.name.split("/") for file in files)):
        if other[: len(one)] == one:  # the same, or a file where the other has a folder
            raise ValueError(f"{shown('/'.join(one))} stands for two files")
    places: list[list[tuple[int, int]]] = [[] for _ in files]
    for section in sections:
        if section.file >= len(files):
            raise ValueError(f"there is no file {section.file}")
        places[section.file] += section.places
    for file, found in zip(files, places, strict=True):
        edges = [(0, 0), *sorted(found), (file.bytes, 0)]
        if any(length == 0 for _, length in found) or any(sum(one) != other[0] for one, other in pairwise(edges)):
            raise ValueError(f"the sections of {shown(file.name)} do not make {file.bytes:,} bytes")
