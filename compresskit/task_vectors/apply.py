"""Apply a ternary task vector, with its base if it has one, one dense tensor at a time."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint.reader import Checkpoint
from compresskit.errors import RequestError
from compresskit.formats.peft import Adapter
from compresskit.task_vectors.vector import TernaryVector

if TYPE_CHECKING:
    from torch import Tensor


def base_digest(base: Checkpoint) -> str:
    """SHA-256 over the hashes of a checkpoint's weight files."""
    return hashlib.sha256(json.dumps(base.hashes, sort_keys=True).encode()).hexdigest()


def check_base(vector: TernaryVector, base: Checkpoint | None) -> None:
    """Raise RequestError if the vector needs another base than the given one."""
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


def applied_tensor(vector: TernaryVector, name: str, base: Checkpoint | None, alpha: float = 1.0) -> Tensor:
    """Compute a dense tensor: offset + alpha * scale * sign; with a base, the base's tensor + alpha * scale * sign.

    Returns:
        The tensor in its stored shape and dtype, on the CPU; computed in float32.

    Raises:
        CheckpointError: the file is damaged.
    """
    import torch

    from compresskit.machine.precision import torch_dtype

    entry = vector.container.tensors[name]
    out = torch.empty(entry.spec.elements, dtype=torch_dtype(entry.spec.dtype))
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
class AppliedVector(Checkpoint):
    """A checkpoint, or an adapter's tensors, with a ternary vector applied on reading."""

    vector: TernaryVector = field(kw_only=True)
    base: Checkpoint | None = field(kw_only=True, default=None)
    alpha: float = field(kw_only=True, default=1.0)
    """Multiplier of the vector's own scales."""

    def read(self, name: str) -> Tensor:
        """Read one tensor; tensors outside the vector are returned as stored."""
        if name not in self.vector.specs:
            return super().read(name)
        return applied_tensor(self.vector, name, self.base, self.alpha)


def applied_checkpoint(base: Checkpoint, vector: TernaryVector, alpha: float = 1.0) -> AppliedVector:
    """The base with the vector of a whole checkpoint times alpha."""
    files = base.file_of | dict.fromkeys(vector.specs, vector.container.path)
    parts = base.folder, base.config, base.tensors, files
    return AppliedVector(*parts, stored=base.stored, vector=vector, base=base, alpha=alpha)


def applied_adapter(vector: TernaryVector, config: dict[str, Any], alpha: float = 1.0) -> Adapter:
    """The vector times alpha as a LoRA adapter. `config` is its adapter_config.json."""
    files = dict.fromkeys(vector.specs, vector.container.path)
    return Adapter(vector.folder, config, AppliedVector(vector.folder, config, vector.specs, files, vector=vector, alpha=alpha))
