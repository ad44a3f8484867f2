"""Tensors outside the vectors that a merge keeps as they are, because the sources do not differ in them.

With the factors of an embedding peft saves the base's own weight of it. All sources that hold it must hold the same. What else
lies outside a vector (DoRA's magnitudes, modules_to_save, trained biases) must be the same in all sources.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from compresskit.checkpoint.reader import BYTES_PER_ELEMENT, TensorSpec
from compresskit.errors import RequestError
from compresskit.task_vectors.pairs import COPY_OF_BASE
from compresskit.task_vectors.vector import PlainVector, TaskVector

if TYPE_CHECKING:
    from torch import Tensor

Kept = dict[str, tuple[TensorSpec, TaskVector]]
"""By name, a tensor and a source that holds it."""


def kept_as_they_are(vectors: list[TaskVector], is_kept: Callable[[str], bool] = lambda name: True) -> Kept:
    """Find the tensors outside the vectors that the result keeps.

    `is_kept` says whether the result can hold a tensor of this name.

    Returns:
        The tensors and where they are; two sources' are compared byte by byte.

    Raises:
        RequestError: two sources differ in a tensor outside the vector, or the result cannot hold it.
    """
    found: Kept = {}
    for vector in vectors:
        for name, spec in vector.dense.items():
            known = found.setdefault(name, (spec, vector))
            differs = known[1] is not vector and not _same(name, spec, vector, *known)
            lacks = not name.endswith(COPY_OF_BASE) and next((v.folder for v in vectors if name not in v.dense), None)
            if differs or lacks or not is_kept(name):
                why = f", and {known[1].folder} has another" if differs else f", and {lacks} has none" if lacks else ""
                what = f"{name} is no part of the vector and cannot be merged{why}"
                raise RequestError(f"{vector.folder}: {what}; leave this source out")
    return found


def _same(name: str, spec: TensorSpec, vector: TaskVector, other_spec: TensorSpec, other: TaskVector) -> bool:
    return spec == other_spec and _bytes(vector, name) == _bytes(other, name)


def _bytes(vector: TaskVector, name: str) -> bytes:
    return vector.dense_bytes(name) if isinstance(vector, PlainVector) else vector.container.dense_bytes(name)


def kept_tensor(kept: Kept, name: str) -> Tensor:
    """A kept tensor, to write unchanged: its bits as whole numbers of the same width."""
    import torch

    spec, vector = kept[name]
    numbers = np.frombuffer(bytearray(_bytes(vector, name)), f"i{BYTES_PER_ELEMENT[spec.dtype]}")
    return torch.from_numpy(numbers).reshape(spec.shape)


def kept_specs(kept: Kept) -> list[TensorSpec]:
    """Names, dtypes and shapes of the kept tensors."""
    return [spec for spec, _ in kept.values()]
