"""Cosine similarity of task vectors: shows which ones change the weights in similar directions, before merging.

    cos(x, y) = x . y / (||x|| ||y||)                                                                           (1)

Entries are compared as they are stored. Products of ternary vectors are counted on bit masks (formats/ternary/bitmask.py),
tensor by tensor, so that only scales that differ inside a vector count.

Where adapters scale their LoRA factors differently, the stored factors do not tell what they do to the weights. Then the
updates s B A are compared, from small products alone:

    (s B A) . (t D C) = s t sum((B^T D) * (A C^T))                                                              (2)

symbol  meaning                              shape
A, C    first factors of two sources         (rank, in)
B, D    second factors                       (out, rank)
s, t    scalings (scalings.py)               ()
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compresskit.checkpoint import source
from compresskit.errors import RequestError
from compresskit.formats.peft import CONFIG
from compresskit.formats.ternary.bitmask import dot, masks, norm_squared
from compresskit.task_vectors.merge_entries import check_same_kind
from compresskit.task_vectors.pairs import factors_of, module_of
from compresskit.task_vectors.scalings import CommonScaling, common_scaling
from compresskit.task_vectors.vector import TaskVector, TernaryVector, adapter_config, open_task_vector

Sums = dict[tuple[int, int], float]
OF_UPDATES = "(of the updates of the weights, because the sources' scalings differ)"


def similarity(sources: list[str], base: str | None) -> dict[str, Any]:
    """Compute the cosines between sources of the same tensors.

    Returns:
        The dictionary that `--json` prints; "similarity" is a matrix (sources, sources) with entries from -1 to 1, "compared"
        says of what: "entries", or "updates" where the sources' scalings differ.

    Raises:
        RequestError: the sources have different tensors, or one was balanced.
        CheckpointError: a source is not a task vector, is damaged, or states no scaling.
    """
    base_folder = source.resolve(base) if base else None
    vectors = [open_task_vector(source.resolve(each), base_folder) for each in sources]
    for vector in vectors:
        _check(vectors[0], vector)
    for vector in vectors:
        check_same_kind(vectors[0], vector)
    scaling = common_scaling(vectors)
    if scaling.differ and adapter_config(vectors[0]).get("target_parameters"):
        what = "target_parameters is set, and factors of experts at other scalings cannot be compared"
        raise RequestError(f"{vectors[0].folder / CONFIG}: {what}; compare adapters of one lora_alpha")
    counted = all(isinstance(v, TernaryVector) and v.container.facts.variant != "prune" for v in vectors)
    sums = _of_updates(vectors, scaling) if scaling.differ else _counted(vectors) if counted else _summed(vectors)
    norms = [math.sqrt(sums[i, i]) for i in range(len(vectors))]
    matrix = [
        [sums[min(i, j), max(i, j)] / (norms[i] * norms[j]) if norms[i] and norms[j] else 0.0 for j in range(len(vectors))]
        for i in range(len(vectors))
    ]
    return {
        "stage": "merge",
        "method": "similarity",
        "source": [str(vector.folder) for vector in vectors],
        "compared": "updates" if scaling.differ else "entries",
        "similarity": matrix,
    }


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
    """Products of the signs, by counting bits, times the scales that differ inside a vector."""
    sums: Sums = dict.fromkeys(_pairs(len(vectors)), 0.0)
    containers = [vector.container for vector in vectors if isinstance(vector, TernaryVector)]
    largest = [max((entry.scale for entry in each.tensors.values()), default=0.0) or 1.0 for each in containers]
    for name in vectors[0].specs:
        sizes = [each.tensors[name].scale / scale for each, scale in zip(containers, largest, strict=True)]
        for parts in zip(*(each.parts(name) for each in containers), strict=True):
            found = [masks(part.signs) for part in parts]
            for i, j in sums:
                product = norm_squared(found[i]) if i == j else dot(found[i], found[j])
                sums[i, j] += sizes[i] * sizes[j] * product
    return sums


def _summed(vectors: list[TaskVector]) -> Sums:
    sums: Sums = dict.fromkeys(_pairs(len(vectors)), 0.0)
    for name in vectors[0].specs:
        for parts in zip(*(vector.values(name) for vector in vectors), strict=True):
            exact = [part.astype(np.float64) for part in parts]
            for i, j in sums:
                sums[i, j] += float(exact[i] @ exact[j])
    return sums


def _of_updates(vectors: list[TaskVector], scaling: CommonScaling) -> Sums:
    """Products of the updates, equation 2. A bias (out,) of a B counts as a B whose A is 1."""
    sums: Sums = dict.fromkeys(_pairs(len(vectors)), 0.0)
    for name in vectors[0].specs:
        factors = factors_of(name)
        if factors is not None and name == factors[0]:
            continue  # read with its B
        firsts = [_matrix(vector, factors[0]) for vector in vectors] if factors and name == factors[1] else None
        seconds = [_matrix(vector, name) * _scale(own, name) for vector, own in zip(vectors, scaling.own, strict=True)]
        for i, j in sums:
            inputs = firsts[i] @ firsts[j].T if firsts else 1.0
            sums[i, j] += float((seconds[i].T @ seconds[j] * inputs).sum())
    return sums


def _scale(own: dict[str, float], name: str) -> float:
    """The scaling of a B; 1 for a parameter of another kind."""
    return own.get(module_of(name), 1.0)


def _matrix(vector: TaskVector, name: str) -> NDArray[np.float64]:
    """A tensor of two dimensions, or (entries, 1), float64."""
    values = np.concatenate([*vector.values(name), np.zeros(0, np.float32)]).astype(np.float64)
    shape = vector.specs[name].shape
    return values.reshape(shape if len(shape) == 2 and factors_of(name) else (-1, 1))


def listing(found: dict[str, Any]) -> str:
    """Format the matrix as a table; a line says so if updates were compared."""
    rows = zip(found["source"], found["similarity"], strict=True)
    table = "\n".join(" ".join([*(f"{value:7.4f}" for value in row), name]) for name, row in rows)
    return f"{table}\n{OF_UPDATES}" if found["compared"] == "updates" else table
