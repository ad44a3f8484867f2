"""Cut a file into sections, from its safetensors header alone. Other files are cut into runs of bytes.

Tensors of one last name and dtype share sections: scales lie beside scales, and one table of code lengths serves many small
tensors. Packed codes go with their zero points, 32 rows and more at a time, because a word of zero points spans rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from compresskit.checkpoint.headers import FLOATS, STORED_BYTES, Header, TensorSpec, read_header
from compresskit.formats.archive.planes import BITS_PER_BYTE, BITS_PER_WORD, period
from compresskit.formats.archive.sections import MOST_BITS, MOST_SECTION_BYTES, Section

SUFFIX = ".safetensors"
SECTION_BYTES = 1 << 20
"""Of a section: the processor's cache holds most of what is done with it."""
LARGEST_CUT, MANY_SECTIONS = 1 << 22, 100_000
"""Folders that make more sections get larger ones, up to 4 MiB, for an index that can be read at once."""
TEXT_BYTES = 1 << 22
"""Of a section of a file that is no safetensors file, where repetitions count, and of a header."""
CODES, ZERO_POINTS = "weight_packed", "weight_zero_point"
"""Last names of compressed-tensors' packed linears."""
Place = tuple[int, int]


def section_bytes(folder_bytes: int) -> int:
    """Size to which sections of tensors are cut."""
    size = SECTION_BYTES
    while folder_bytes > size * MANY_SECTIONS and size < LARGEST_CUT:
        size *= 2
    return size


def sections_of(path: Path, number: int, file_bytes: int, most: int) -> list[Section]:
    """Cut a file, which is the archive's `number`-th, into sections, tensors into those of at most `most` bytes.

    Returns:
        The sections, which hold every byte once.

    Raises:
        CheckpointError: it is named as a safetensors file, and is none.
    """
    if path.suffix != SUFFIX:
        return [Section(number, "bytes", (), "file", (place,)) for place in _cut((0, file_bytes), TEXT_BYTES)]
    header = read_header(path, STORED_BYTES)
    first = min(header.starts.values(), default=file_bytes)
    sections = [Section(number, "bytes", (), "header", (place,)) for place in _cut((0, first), TEXT_BYTES)]
    done: set[str] = set()
    for name, spec in header.specs.items():
        partner = header.specs.get(f"{name.removesuffix(CODES)}{ZERO_POINTS}") if name.endswith(f".{CODES}") else None
        if partner is not None and (found := _codes(number, spec, partner, header, most)):
            sections += found
            done |= {name, partner.name}
    return sections + list(_planes(number, header, done, most))


def _cut(place: Place, most: int) -> Iterator[Place]:
    start, length = place
    for offset in range(0, length, most):
        yield start + offset, min(most, length - offset)


def _planes(number: int, header: Header, done: set[str], most: int) -> Iterator[Section]:
    """Sections of all tensors but those in `done`, those of one kind together."""
    kinds: dict[tuple[str, str], list[Place]] = {}
    for name, spec in header.specs.items():
        if name not in done and spec.bytes:
            kind = (name.rpartition(".")[2], spec.dtype)
            kinds.setdefault(kind, []).append((header.starts[name], spec.bytes))
    for (leaf, dtype), places in kinds.items():
        width = STORED_BYTES[dtype]
        parameters = (width, int(dtype in FLOATS and width > 1))
        for batch in _batches(places, most):
            yield Section(number, "planes", parameters, f"{leaf} {dtype}", tuple(batch))


def _batches(places: list[Place], most: int) -> Iterator[list[Place]]:
    """Batches of `most` bytes at most; what lies side by side becomes one place."""
    batch: list[Place] = []
    room = most
    for place in places:
        for start, length in _cut(place, most):
            if length > room:
                yield batch
                batch, room = [], most
            if batch and sum(batch[-1]) == start:
                batch[-1] = (batch[-1][0], batch[-1][1] + length)
            else:
                batch.append((start, length))
            room -= length
    if batch:
        yield batch


def _codes(number: int, codes: TensorSpec, zero_points: TensorSpec, header: Header, most: int) -> list[Section]:
    """Sections of packed codes (rows, words) and their zero points (ceil(rows * bits / 32), groups); none if these do not fit."""
    bits = _bits(codes, zero_points)
    if bits is None:
        return []
    (rows, words), groups = codes.shape, zero_points.shape[1]
    row_bytes = 4 * words
    group_bytes = row_bytes // groups
    step = max(1, most // (row_bytes * BITS_PER_WORD)) * BITS_PER_WORD
    if (step * row_bytes) * 2 > MOST_SECTION_BYTES or group_bytes % period(bits):
        return []
    sections = []
    for start in range(0, rows, step):
        end = min(start + step, rows)
        first, last = (4 * groups * -(-row * bits // BITS_PER_WORD) for row in (start, end))
        places = (
            (header.starts[codes.name] + start * row_bytes, (end - start) * row_bytes),
            (header.starts[zero_points.name] + first, last - first),
        )
        sections.append(Section(number, "codes", (bits, groups, group_bytes), "codes with zero points", places))
    return sections


def _bits(codes: TensorSpec, zero_points: TensorSpec) -> int | None:
    """Bits of the codes, by the rows of both; None if several or none fit, more than `MOST_BITS` do, or groups share a byte."""
    both = (codes, zero_points)
    if any(each.dtype != "I32" or len(each.shape) != 2 or 0 in each.shape for each in both):
        return None
    rows = codes.shape[0]
    found = [bits for bits in range(1, BITS_PER_BYTE + 1) if -(-rows * bits // BITS_PER_WORD) == zero_points.shape[0]]
    if len(found) != 1 or found[0] > MOST_BITS or 4 * codes.shape[1] % zero_points.shape[1]:
        return None
    return found[0]
