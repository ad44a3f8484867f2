"""Packed folders for tests and for benchmarks/archive_fuzz.py: made, packed, read whole, damaged, forged."""

from __future__ import annotations

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_mutations import flipped_cut_or_swapped
from safetensors.torch import save_file

from compresskit.formats.archive.coding import ZSTD, decoded
from compresskit.formats.archive.container import END, MAGIC, open_archive
from compresskit.formats.archive.packing import digests_of, files_of, pack_files, planned_sections
from compresskit.formats.archive.restoring import restore
from compresskit.numerics.bit_packing import packed

KINDS = ("flip", "cut", "swap", "lose", "end", "number", "section")
"""What `mutated` does."""


def silent(done: int, total: int) -> None:
    assert done <= total


def low_bit_tensors(bits: int, rows: int = 96, groups: int = 4, group: int = 64, seed: int = 0) -> dict[str, torch.Tensor]:
    """A linear as compressed-tensors packs it: min-max codes of Gaussian weights, group by group."""
    weight = torch.randn(rows, groups, group, generator=torch.Generator().manual_seed(seed)) * 0.02
    low, high = weight.amin(-1, keepdim=True).clamp(max=0), weight.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / ((1 << bits) - 1)
    zero = (-low / scale).round()
    codes = (weight / scale + zero).round().clamp(0, (1 << bits) - 1).flatten(1) - (1 << (bits - 1))
    points = zero.squeeze(-1) - (1 << (bits - 1))
    return {
        "a.weight_packed": packed(codes, bits),
        "a.weight_scale": scale.squeeze(-1).to(torch.bfloat16),
        "a.weight_shape": torch.tensor([rows, groups * group]),
        "a.weight_zero_point": packed(points.T.contiguous(), bits).T.contiguous(),
    }


def small_folder(folder: Path) -> Path:
    """A folder with all kinds of content: codes, floats of several widths, text, a subfolder, an empty file."""
    (folder / "adapter").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    floats = {
        name: torch.randn(40, 60, generator=generator).to(dtype)
        for name, dtype in (("e.weight", torch.bfloat16), ("n.weight", torch.float16))
    }
    floats |= {
        "h.weight": torch.randn(30, 20, generator=generator),
        "f.weight": torch.randn(64, 32, generator=generator).to(torch.float8_e4m3fn),
        "z.weight": torch.zeros(0, 4),
    }
    save_file(low_bit_tensors(2) | floats, folder / "model.safetensors", {"format": "pt"})
    save_file({"lora_A.weight": torch.randn(4, 60, generator=generator)}, folder / "adapter" / "adapter_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"hidden_size": 60, "layers": list(range(200))}, indent=2))
    (folder / "noise.bin").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "empty").touch()
    return folder


def write(folder: Path, path: Path, threads: int = 1) -> None:
    files = files_of(folder)
    pack_files(files, planned_sections(files), digests_of(files, threads), path, threads, silent)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by its name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path, folder: Path) -> dict[str, bytes]:
    """Every file of an archive by its name; `folder` is made and removed."""
    archive = open_archive(path)
    folder.mkdir()
    try:
        restore(archive, folder, 1, silent)
        return content(folder)
    finally:
        shutil.rmtree(folder)


def mutated(data: bytes, kind: str, a: int, b: int) -> bytes:
    """A damaged copy: a flipped bit, a cut, pieces that change places or are lost, a forged number or section."""
    changed = bytearray(data)
    if kind == "section":
        return forged(data, lambda index: None, lambda index, body: _change_byte(index, body, a, b))
    if kind == "number":
        return forged(data, lambda index: _change_number(index, a, b))
    if kind == "lose":
        place = a % len(data)
        del changed[place : place + 1 + b % 50]
    elif kind == "end":
        changed[-1 - a % END.size] ^= 1 << b % 8
    else:
        return flipped_cut_or_swapped(data, kind, a, b)
    return bytes(changed)


def forged(
    data: bytes, change: Callable[[dict[str, Any]], None], damage: Callable[[dict[str, Any], bytearray], None] | None = None
) -> bytes:
    """The archive with a changed index, and sections damaged, whose checksums are right."""
    packed_bytes, text_bytes, _, _ = END.unpack(data[-END.size :])
    start = len(data) - END.size - packed_bytes
    stored = data[start : start + packed_bytes]
    if text_bytes:
        stored = bytes(decoded(ZSTD, stored, text_bytes))
    index = json.loads(stored)
    change(index)
    body = bytearray(data[:start])
    if damage is not None:
        damage(index, body)
    text = json.dumps(index).encode()
    return bytes(body) + text + END.pack(len(text), 0, hashlib.sha256(text).digest(), MAGIC)


def _change_byte(index: dict[str, Any], body: bytearray, a: int, b: int) -> None:
    """A bit somewhere in the sections, and the CRC-32 of its section."""
    place, start = len(MAGIC) + a % (len(body) - len(MAGIC)), len(MAGIC)
    body[place] ^= 1 << b % 8
    for row in index["sections"]:
        if start <= place < start + row[5]:
            row[6] = zlib.crc32(body[start : start + row[5]])
        start += row[5]


def _change_number(index: dict[str, Any], a: int, b: int) -> None:
    """One number somewhere in the index becomes another."""
    where: list[tuple[Any, Any]] = []

    def look(value: Any) -> None:
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(each, dict | list):
                look(each)
            elif type(each) is int:
                where.append((value, key))

    look(index)
    value, key = where[a % len(where)]
    value[key] = (b, value[key] + 1, value[key] - 1, -1, 0, 1 << b % 70)[b % 6]
