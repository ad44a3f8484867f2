"""A ternary task vector turned back: its tensors, on the base that it was made from, read one at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compresskit.checkpoint.reader import Checkpoint
from compresskit.errors import RequestError
from compresskit.task_vectors import TernaryVector

if TYPE_CHECKING:
    from torch import Tensor


def base_digest(base: Checkpoint) -> str:
    """One SHA-256 over those of a checkpoint's weight files."""
    return hashlib.sha256(json.dumps(base.hashes, sort_keys=True).encode()).hexdigest()


def check_base(vector: TernaryVector, base: Checkpoint | None) -> None:
    """RequestError where the vector needs another base than the given one."""
    wanted = vector.container.facts.base
    if not wanted:
        return
    if base is None:
        raise RequestError(f"{vector.folder}: is the difference to a checkpoint; pass that as --base")
    found = base_digest(base)
    if found != wanted:
        raise RequestError(
            f"--base {base.folder}: its weights have SHA-256 {found[:12]}, {vector.folder} was made on {wanted[:12]}; "
            "use the same checkpoint"
        )


def restored(vector: TernaryVector, name: str, base: Checkpoint | None, alpha: float = 1.0) -> Tensor:
    """The tensor that a ternary one stands for: offset + alpha * scale * sign, or with a base alpha * scale * sign + the base's.

    Returns:
        The tensor in its stored shape and dtype, on the CPU; computed in float32.

    Raises:
        CheckpointError: the file is damaged.
    """
    import torch

    from compresskit.checkpoint.dtypes import TORCH_DTYPES

    entry = vector.container.tensors[name]
    out = torch.empty(entry.spec.elements, dtype=TORCH_DTYPES[entry.spec.dtype])
    dense = base.read(name).reshape(-1) if base else None
    start = 0
    for values in vector.values(name):
        part = torch.from_numpy(values)
        part *= alpha
        stop = start + len(part)
        part += dense[start:stop].float() if dense is not None else entry.offset
        out[start:stop] = part
        start = stop
    return out.reshape(entry.spec.shape)


@dataclass(frozen=True)
class Restored(Checkpoint):
    """A checkpoint or an adapter's store whose tensors are restored from a ternary vector when they are read."""

    vector: TernaryVector | None = None
    base: Checkpoint | None = None
    alpha: float = 1.0

    def read(self, name: str) -> Tensor:
        """One tensor, restored where the vector holds it."""
        if self.vector is None or name not in self.vector.specs:
            return super().read(name)
        return restored(self.vector, name, self.base, self.alpha)
