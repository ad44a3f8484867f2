"""The file of a ternary task vector, a safetensors file.

Its tensors are

    dense tensors           unchanged, under their own names (DoRA magnitudes, modules_to_save)
    compresskit.payload     bytes: the sections of all ternary tensors (sections.py), in order
    compresskit.index       bytes: zlib-compressed JSON, the tensors and how each section is stored

and its metadata hold format, version, variant, density, alpha, coding, block length, the base's hash, and CRC-32s of the
index and of the metadata. The index is compressed because names would take more space than the weights of small adapters.

    entry of tensor i = offset_i + scale_i * sign                           rounded to its dtype

The offset is 0, or 1 for tensors that multiply (IA3). Writing takes one pass and keeps only the table of blocks. Reading
checks every length against the file size before allocating.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from compresskit.checkpoint.reader import TensorSpec
from compresskit.checkpoint.whole_files import storing
from compresskit.formats.ternary.golomb import Signs
from compresskit.formats.ternary.sections import BLOCK, SECTION, Coding, encode

FORMAT = "compresskit-ternary"
VERSION = "1"
PAYLOAD = "compresskit.payload"
INDEX = "compresskit.index"
ALIGNMENT = 8
WIDEST_NUMBER = 10**17
"""Placeholder for unknown sizes when space for the header is reserved."""


@dataclass(frozen=True)
class Facts:
    """Properties of the whole vector."""

    variant: str
    """compeft and stc: one scale; prune: the values of the kept entries."""
    density: float
    alpha: float
    coding: Coding
    base: str
    """SHA-256 over the base's weight files, "" if the vector needs no base."""
    balanced: bool = False
    """Whether pairs of LoRA factors were balanced first; their ranks then match no other adapter's."""


class Part(NamedTuple):
    """The next section of a tensor."""

    signs: Signs
    values: bytes = b""
    """Values of the non-zeros, for vectors that keep them."""


class Ternary(NamedTuple):
    """One ternary tensor to write."""

    spec: TensorSpec
    scale: float
    offset: float
    parts: Iterable[Part]
    """SECTION entries each, except for the last."""


def write_container(
    path: Path, facts: Facts, dense: list[TensorSpec], read: Callable[[str], bytes], tensors: Iterable[Ternary]
) -> list[dict[str, Any]]:
    """Write the file in one pass over the tensors. `read` returns the bytes of a dense tensor by name.

    Returns:
        The index of the ternary tensors: name, dtype, shape, scale, offset and sections of each.
    """
    room = len(_header(facts, dense, WIDEST_NUMBER, WIDEST_NUMBER, (0, WIDEST_NUMBER)))
    room += -room % ALIGNMENT
    rows: list[list[Any]] = []
    with storing(path), path.open("wb") as file:
        file.write(b" " * (8 + room))
        for spec in dense:
            data = read(spec.name)
            rows.append([spec.name, spec.dtype, list(spec.shape), zlib.crc32(data)])
            file.write(data)
        start = file.tell()
        entries = [_write_tensor(file, number, tensor, facts.coding) for number, tensor in enumerate(tensors)]
        payload = file.tell() - start
        text = json.dumps({"tensors": entries, "dense": rows}, separators=(",", ":")).encode()
        packed = zlib.compress(text, 9)
        file.write(packed)
        header = _header(facts, dense, payload, len(packed), (zlib.crc32(packed), len(text)))
        file.seek(0)
        file.write(struct.pack("<Q", room) + header.ljust(room))
    return entries


def _write_tensor(file: BinaryIO, number: int, tensor: Ternary, coding: Coding) -> dict[str, Any]:
    sections = []
    for place, part in enumerate(tensor.parts):
        section, body = encode(part.signs, part.values, coding, (number, place * (SECTION // BLOCK)))
        file.write(body)
        sections.append(list(section))
    spec = tensor.spec
    return {"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape), "scale": tensor.scale,
            "offset": tensor.offset, "sections": sections}  # fmt: skip


def metadata_checksum(metadata: dict[str, str]) -> str:
    """CRC-32 over all metadata except the checksum itself."""
    rest = {key: value for key, value in metadata.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def _header(facts: Facts, dense: list[TensorSpec], payload: int, packed: int, index: tuple[int, int]) -> bytes:
    """Build the safetensors header; `index`: (CRC-32 of the packed index, its unpacked bytes)."""
    metadata = {key: str(value) for key, value in asdict(facts).items()}
    metadata |= {"format": FORMAT, "version": VERSION, "block_length": str(BLOCK)}
    metadata |= {"index_crc32": f"{index[0]:08x}", "index_bytes": str(index[1])}
    metadata["crc32"] = metadata_checksum(metadata)
    entries: dict[str, Any] = {"__metadata__": metadata}
    position = 0
    bytes_of = [(TensorSpec(PAYLOAD, "U8", (payload,))), TensorSpec(INDEX, "U8", (packed,))]
    for spec in (*dense, *bytes_of):
        span = [position, position + spec.bytes]
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": span}
        position += spec.bytes
    return json.dumps(entries, separators=(",", ":")).encode()
