"""Plan a stage's output files before any tensor exists: names, headers, offsets, sizes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compresskit.checkpoint.reader import TensorSpec

SAFETENSORS_ALIGNMENT = 8


@dataclass(frozen=True)
class Shard:
    """Plan of one safetensors file: its name, its header and the offset of each tensor."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int


def layout_shards(specs: list[TensorSpec], max_shard_bytes: int) -> list[Shard]:
    """Assign tensors to files in order; a tensor larger than the limit gets its own file. No tensors give no files."""
    if not specs:
        return []
    files: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if files[-1] and filled + spec.bytes > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(spec)
        filled += spec.bytes
    single = len(files) == 1
    return [
        _shard("model.safetensors" if single else f"model-{i:05d}-of-{len(files):05d}.safetensors", specs)
        for i, specs in enumerate(files, start=1)
    ]


def _shard(name: str, specs: list[TensorSpec]) -> Shard:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    starts = {}
    for spec in specs:
        starts[spec.name] = position
        entries[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.bytes],
        }
        position += spec.bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % SAFETENSORS_ALIGNMENT)
    header = struct.pack("<Q", len(text)) + text
    return Shard(name, header, {n: len(header) + start for n, start in starts.items()}, len(header) + position)


@dataclass(frozen=True)
class Outputs:
    """Planned weight files of a stage, and the small files that go with them."""

    tensors: list[TensorSpec] = field(default_factory=list)
    """The checkpoint's tensors in file order; empty if OUT holds only an adapter."""
    config: dict[str, Any] | None = None
    """config.json, None if OUT holds no checkpoint."""
    extra: Mapping[str, list[TensorSpec]] = field(default_factory=dict)
    """Tensors of safetensors files outside the checkpoint, by path inside the folder."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Generated files, by name."""
    left_out: frozenset[str] = frozenset()
    """Side files of the source that OUT does not get."""

    @property
    def specs(self) -> list[TensorSpec]:
        """All tensors."""
        return [*self.tensors, *(spec for specs in self.extra.values() for spec in specs)]

    def model_shards(self, max_shard_bytes: int) -> list[Shard]:
        """Plans of the checkpoint's files."""
        return layout_shards(self.tensors, max_shard_bytes)

    @property
    def extra_shards(self) -> list[Shard]:
        """Plans of the other safetensors files."""
        return [_shard(name, specs) for name, specs in self.extra.items()]

    def bytes(self, max_shard_bytes: int) -> int:
        """Size of all weight files, including headers."""
        return sum(shard.size for shard in (*self.model_shards(max_shard_bytes), *self.extra_shards))
