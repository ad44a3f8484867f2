"""A section: up to 2**22 entries of a tensor in one coding, cut into independently decodable blocks of 8,192.

    table      one row per block: CRC-32 (4 bytes), non-zeros (2), bytes (2), little-endian
    blocks     one after the other
    values     of the non-zeros, in the tensor's dtype, with their own CRC-32; only if values are kept (variant prune)

A block's CRC also covers its tensor number, block number and count, so swapped blocks are detected.
"""

from __future__ import annotations

import struct
import zlib
from typing import Literal, NamedTuple

import numpy as np

from compresskit.errors import CheckpointError
from compresskit.formats.ternary import bitmask, golomb
from compresskit.formats.ternary.golomb import Signs

BLOCK = 8192
SECTION = BLOCK * 512
ROW = np.dtype([("crc", "<u4"), ("count", "<u2"), ("bytes", "<u2")])
Coding = Literal["auto", "golomb", "bitmask"]
SURELY_DENSE = 0.6
"""Above this density a mask is always smaller, so golomb is not tried."""


class Section(NamedTuple):
    """A section's entry in the index."""

    coding: str
    rice: int
    nonzeros: int
    bytes: int
    """Size of table, blocks and values."""
    values_crc: int = 0


def entries_of_sections(entries: int) -> list[int]:
    """Number of entries in each section of a tensor."""
    return [min(SECTION, entries - start) for start in range(0, entries, SECTION)]


def encode(signs: Signs, values: bytes, coding: Coding, place: tuple[int, int]) -> tuple[Section, bytes]:
    """Encode a section (entries,) int8; `place`: (number of its tensor, number of its first block)."""
    density = np.count_nonzero(signs) / max(1, len(signs))
    blocks = [signs[start : start + BLOCK] for start in range(0, len(signs), BLOCK)]
    rice = golomb.rice_parameter(density)
    masked = sum(bitmask.size(len(block), int(np.count_nonzero(block))) for block in blocks)
    encoded: list[tuple[int, bytes]] = []
    if coding == "golomb" or (coding == "auto" and density < SURELY_DENSE):
        encoded = [golomb.encode(block, rice) for block in blocks]
    chosen = "golomb"
    if coding == "bitmask" or not encoded or (coding == "auto" and sum(len(data) for _, data in encoded) > masked):
        encoded, chosen, rice = [bitmask.encode(block) for block in blocks], "bitmask", 0
    table = np.empty(len(blocks), ROW)
    for number, (count, data) in enumerate(encoded):
        table[number] = (checksum(data, place[0], place[1] + number, count), count, len(data))
    body = b"".join((table.tobytes(), *(data for _, data in encoded), values))
    nonzeros = sum(count for count, _ in encoded)
    return Section(chosen, rice, nonzeros, len(body), zlib.crc32(values)), body


def checksum(data: bytes | memoryview, tensor: int, block: int, count: int) -> int:
    """CRC-32 of a block, its position and its count."""
    return zlib.crc32(data, zlib.crc32(struct.pack("<IIH", tensor, block, count)))


def decode(body: bytes, section: Section, entries: int, place: tuple[int, int], name: str) -> tuple[Signs, bytes]:
    """Decode a section to (signs (entries,) int8, values); CheckpointError names the damaged tensor and block."""
    blocks = -(-entries // BLOCK)
    view = memoryview(body)
    start = blocks * ROW.itemsize
    if len(body) < start:
        raise CheckpointError(f"{name}: block {place[1]}: the table of its blocks is cut off; get an intact copy of the file")
    signs = np.zeros(entries, np.int8)
    nonzeros = 0
    for number, (crc, count, length) in enumerate(np.frombuffer(view[:start], ROW).tolist()):
        data = view[start : start + length]
        part = signs[number * BLOCK : (number + 1) * BLOCK]
        whole = len(data) == length and crc == checksum(data, place[0], place[1] + number, count)
        if not whole or not _decode_block(np.frombuffer(data, np.uint8), count, section, part):
            raise CheckpointError(f"{name}: block {place[1] + number} is damaged; get an intact copy of the file")
        start += length
        nonzeros += count
    values = bytes(view[start:])
    if nonzeros != section.nonzeros or zlib.crc32(values) != section.values_crc:
        raise CheckpointError(f"{name}: blocks from {place[1]} on contradict the index; get an intact copy of the file")
    return signs, values


def _decode_block(data: golomb.Bits, count: int, section: Section, signs: Signs) -> bool:
    if section.coding == "golomb":
        return golomb.decode(data, count, section.rice, signs)
    return bitmask.decode(data, count, signs)
