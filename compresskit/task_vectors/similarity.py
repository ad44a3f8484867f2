"""Cosine similarity of task vectors: shows which ones change the weights in similar directions, before merging.

    cos(x, y) = x . y / (||x|| ||y||)

Ternary vectors need no scales: their products are counted on bit masks (formats/ternary/bitmask.py).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from compresskit.checkpoint import source
from compresskit.errors import RequestError
from compresskit.formats.ternary.bitmask import dot, masks, norm_squared
from compresskit.task_vectors.vector import TaskVector, TernaryVector, open_task_vector

Sums = dict[tuple[int, int], float]


def similarity(sources: list[str], base: str | None) -> dict[str, Any]:
    """Compute the cosines between sources of the same tensors.

    Returns:
        The dictionary that `--json` prints; "similarity" is a matrix (sources, sources) with entries from -1 to 1.

    Raises:
        RequestError: the sources have different tensors, or one was balanced.
        CheckpointError: a source is not a task vector, or is damaged.
    """
    base_folder = source.resolve(base) if base else None
    vectors = [open_task_vector(source.resolve(each), base_folder) for each in sources]
    for vector in vectors:
        _check(vectors[0], vector)
    counted = all(isinstance(v, TernaryVector) and v.container.facts.variant != "prune" for v in vectors)
    sums = _counted(vectors) if counted else _summed(vectors)
    norms = [math.sqrt(sums[i, i]) for i in range(len(vectors))]
    matrix = [
        [sums[min(i, j), max(i, j)] / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0 for j in range(len(vectors))]
        for i in range(len(vectors))
    ]
    return {"stage": "merge", "method": "similarity", "source": [str(vector.folder) for vector in vectors], "similarity": matrix}


def _check(first: TaskVector, vector: TaskVector) -> None:
    if isinstance(vector, TernaryVector) and vector.container.facts.balanced:
        raise RequestError(
            f"{vector.folder}: its factors were balanced, their ranks match no other's; compress with --no-balance"
        )
    if {n: s.shape for n, s in vector.specs.items()} != {n: s.shape for n, s in first.specs.items()}:
        raise RequestError(f"{vector.folder}: has other tensors than {first.folder}; compare vectors of the same tensors")


def _pairs(count: int) -> list[tuple[int, int]]:
    return list(itertools.combinations_with_replacement(range(count), 2))


def _counted(vectors: list[TaskVector]) -> Sums:
    """Products of the signs, by counting bits."""
    sums: Sums = dict.fromkeys(_pairs(len(vectors)), 0.0)
    containers = [vector.container for vector in vectors if isinstance(vector, TernaryVector)]
    for name in vectors[0].specs:
        for parts in zip(*(each.parts(name) for each in containers), strict=True):
            found = [masks(part.signs) for part in parts]
            for i, j in sums:
                sums[i, j] += norm_squared(found[i]) if i == j else dot(found[i], found[j])
    return sums


def _summed(vectors: list[TaskVector]) -> Sums:
    sums: Sums = dict.fromkeys(_pairs(len(vectors)), 0.0)
    for name in vectors[0].specs:
        for parts in zip(*(vector.values(name) for vector in vectors), strict=True):
            exact = [part.astype(np.float64) for part in parts]
            for i, j in sums:
                sums[i, j] += float(exact[i] @ exact[j])
    return sums


def listing(found: dict[str, Any]) -> str:
    """Format the matrix as a table."""
    rows = zip(found["source"], found["similarity"], strict=True)
    return "\n".join(" ".join([*(f"{value:7.4f}" for value in row), name]) for name, row in rows)
