"""Ternary files for tests and for benchmarks/ternary_fuzz.py: written, read whole, and damaged."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fuzz_mutations import flipped_cut_or_swapped

from compresskit.checkpoint.reader import TensorSpec
from compresskit.formats.ternary.container import Facts, Part, Ternary, write_container
from compresskit.formats.ternary.reading import open_container
from compresskit.formats.ternary.sections import SECTION, Coding

DENSE = TensorSpec("magnitude", "F32", (3,))
KINDS = ("flip", "cut", "swap", "header", "length")
"""What `mutated` does."""


def random_signs(entries: int, density: float, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    kept = generator.random(entries) < density
    return (kept * (1 - 2 * generator.integers(0, 2, entries))).astype(np.int8)


def write(path: Path, vectors: dict[str, np.ndarray], coding: Coding = "auto", values: bool = False) -> None:
    def parts(signs: np.ndarray) -> Iterator[Part]:
        for start in range(0, len(signs), SECTION):
            part = signs[start : start + SECTION]
            yield Part(part, b"ab" * int(np.count_nonzero(part)) if values else b"")

    tensors = (Ternary(TensorSpec(n, "BF16", (len(s),)), 0.5, 0.0, parts(s)) for n, s in vectors.items())
    write_container(path, Facts("compeft", 0.2, 1.0, coding, ""), [DENSE], lambda name: bytes(range(12)), tensors)


def read(path: Path) -> dict[str, list[object]]:
    """Everything in a file, in a form that can be compared."""
    found = open_container(path)
    everything: dict[str, list[object]] = {"facts": [found.facts]}
    for name, entry in found.tensors.items():
        parts = list(found.parts(name))
        everything[name] = [entry.spec, entry.scale, entry.offset, *((p.signs.tobytes(), p.values) for p in parts)]
    return everything | {name: [spec, found.dense_bytes(name)] for name, spec in found.dense.items()}


def small_file(folder: Path) -> bytes:
    path = folder / "original"
    write(path, {"first": random_signs(20_000, 0.1, 1), "second": random_signs(9000, 0.5, 2)})
    return path.read_bytes()


def mutated(data: bytes, kind: str, a: int, b: int) -> bytes:
    """A damaged copy: a flipped bit, a cut, two pieces that change places, a forged number in the header."""
    changed = bytearray(data)
    if kind == "header":
        size = struct.unpack("<Q", data[:8])[0]
        digits = [i for i in range(8, 8 + size) if chr(data[i]).isdigit()]
        changed[digits[a % len(digits)]] = ord("0") + b % 10
    elif kind == "length":
        changed[:8] = struct.pack("<Q", a)
    else:
        return flipped_cut_or_swapped(data, kind, a, b)
    return bytes(changed)
