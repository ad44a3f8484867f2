"""A section: up to 16 MiB of one file, in one or several places of it, coded on its own.

    kind      parameters                              what its runs are
    bytes                                             the bytes as they stand
    planes    width, turned (0 or 1)                  the planes of elements (planes.py)
    codes     bits, groups of a row, group bytes      the packed zero points, and the groups of each zero point

Stored: the number of runs, one row of the table `ROW` for each, the runs. The CRC-32 of all that is in the index. A section needs
no other, so they are coded and decoded in any order and in several threads.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from compresskit.errors import CheckpointError
from compresskit.formats.archive.coding import QUICK, SMALLEST, Run, coded, decoded
from compresskit.formats.archive.planes import (
    BITS_PER_WORD,
    Bytes,
    by_zero_point,
    from_zero_points,
    joined,
    period,
    planes,
    zero_points_of,
)

MOST_SECTION_BYTES = 1 << 24
"""Sections are cut smaller (planning.py), but 32 rows of codes stay together."""
MOST_BITS = 4
"""Of codes that are put in the order of their zero points: with more, the tables cost what is won."""
LARGEST_SHORT_FILE = 1 << 25
"""Texts up to here are coded at zstd's level 19, 2 MB a second; longer files are rarely texts."""
ROW = np.dtype([("coding", "u1"), ("stored", "<u4"), ("bytes", "<u4")])
COUNT_BYTES = 2
TURNED_WIDTHS = (2, 4, 8)
"""Bytes of floats."""
PARAMETERS = {"bytes": 0, "planes": 2, "codes": 3}
"""Number of each kind's parameters."""


@dataclass(frozen=True)
class Section:
    """A section's entry in the index."""

    file: int
    """Number of its file."""
    kind: str
    parameters: tuple[int, ...]
    label: str
    """What it holds, for people: a tensor's last name and its dtype, `header`, or `file`."""
    places: tuple[tuple[int, int], ...]
    """(first byte in the file, bytes) of each part, in the order in which they are joined."""
    stored: int = 0
    """Size in the archive; 0 before it is coded."""
    crc: int = 0

    @property
    def bytes(self) -> int:
        """Size in the file."""
        return sum(length for _, length in self.places)


def encode(section: Section, data: Bytes, file_bytes: int) -> tuple[Section, bytes]:
    """Code a section's bytes (section.bytes,), of a file of `file_bytes`.

    Returns:
        (the section's entry, what is stored). Codes become planes where their zero points win nothing.
    """
    if section.kind == "codes":
        width = period(section.parameters[0])
        plain = replace(section, kind="planes", parameters=(width if section.bytes % width == 0 else 1, 0))
        return min(_encoded(section, _runs(section, data), None), _encoded(plain, _runs(plain, data), None), key=_size)
    level = SMALLEST if section.kind == "bytes" and file_bytes <= LARGEST_SHORT_FILE else QUICK
    return _encoded(section, _runs(section, data), level)


def _size(found: tuple[Section, bytes]) -> int:
    return found[0].stored


def _runs(section: Section, data: Bytes) -> list[Bytes]:
    if section.kind == "bytes":
        return [data]
    if section.kind == "planes":
        return planes(data, section.parameters[0], bool(section.parameters[1]))
    bits, groups, _ = section.parameters
    codes, words = data[: section.places[0][1]], data[section.places[0][1] :]
    return [words, *by_zero_point(codes, zero_points_of(words, bits, _rows(section), groups), bits)]


def _rows(section: Section) -> int:
    """Rows of a section of codes."""
    _, groups, group_bytes = section.parameters
    return section.places[0][1] // (groups * group_bytes)


def _encoded(section: Section, runs: list[Bytes], level: int | None) -> tuple[Section, bytes]:
    found = [coded(run.data, level) for run in runs]
    table = np.array([(how, len(part), len(run)) for (how, part), run in zip(found, runs, strict=True)], ROW)
    stored = b"".join((len(runs).to_bytes(COUNT_BYTES, "little"), table.tobytes(), *(part for _, part in found)))
    return replace(section, stored=len(stored), crc=zlib.crc32(stored)), stored


def decode(section: Section, stored: bytes | bytearray) -> Bytes:
    """Decode a section.

    Returns:
        (section.bytes,).

    Raises:
        CheckpointError: it is damaged; a few words that say where.
    """
    if len(stored) != section.stored or zlib.crc32(stored) != section.crc:
        raise CheckpointError("its checksum is wrong")
    runs = _decoded_runs(section, memoryview(stored))
    if section.kind == "bytes":
        return runs[0] if len(runs) == 1 else _refuse("runs")
    if section.kind == "planes":
        width, turned = section.parameters
        return joined(runs, bool(turned)) if len(runs) == width and len({*map(len, runs)}) == 1 else _refuse("planes")
    bits, groups, _ = section.parameters
    if len(runs) != 1 + period(bits) * (1 << bits) or len(runs[0]) != section.places[1][1]:
        _refuse("runs")
    data, codes_bytes = np.empty(section.bytes, np.uint8), section.places[0][1]
    data[codes_bytes:] = runs[0]
    try:
        from_zero_points(runs[1:], zero_points_of(runs[0], bits, _rows(section), groups), bits, data[:codes_bytes])
    except ValueError:
        _refuse("groups")
    return data


def _refuse(what: str) -> NoReturn:
    raise CheckpointError(f"it has other {what} than the index says")


def _decoded_runs(section: Section, stored: memoryview) -> list[Bytes]:
    """The runs of what is stored; their lengths are checked before anything is decoded."""
    count = int.from_bytes(stored[:COUNT_BYTES], "little")
    start = COUNT_BYTES + count * ROW.itemsize
    if count == 0 or len(stored) < start:
        raise CheckpointError("its table is cut short")
    rows = np.frombuffer(stored[COUNT_BYTES:start], ROW).tolist()
    if sum(row[2] for row in rows) != section.bytes or start + sum(row[1] for row in rows) != len(stored):
        raise CheckpointError("its table contradicts the index")
    runs = []
    for coding, length, size in rows:
        run: Run = decoded(coding, stored[start : start + length], size)
        runs.append(np.frombuffer(run, np.uint8))
        start += length
    return runs


def fault(section: Section) -> str:
    """What is wrong with an entry that was read of an index, "" if it can be decoded; its places are checked elsewhere."""
    parameters = section.parameters
    if len(parameters) != PARAMETERS.get(section.kind, -1) or not 0 < section.bytes <= MOST_SECTION_BYTES:
        return "kind"
    if section.kind == "planes":
        width, turned = parameters
        right = width in TURNED_WIDTHS if turned == 1 else turned == 0 and 1 <= width <= 8
        return "" if right and section.bytes % width == 0 else "planes"
    if section.kind == "codes":
        bits, groups, group_bytes = parameters
        if not (1 <= bits <= MOST_BITS and groups > 0 and group_bytes > 0 and len(section.places) == 2):
            return "codes"
        codes, words = (length for _, length in section.places)
        right = codes % (groups * group_bytes) == 0 and group_bytes % period(bits) == 0
        return "" if right and words == 4 * groups * -(-_rows(section) * bits // BITS_PER_WORD) else "codes"
    return ""
