"""Merge whole vectors at once, for methods that compare an entry with all others: 4 bytes x entries x sources in memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from compresskit.task_vectors.merging.method import MergeMethod, Values


def merged_whole(
    method: MergeMethod, reads: Sequence[Callable[[str], Iterator[Values]]], sizes: Mapping[str, int]
) -> Callable[[str], Iterator[Values]]:
    """Merge all tensors at once. `reads` give the sections of each source, `sizes` the entries of each tensor, in order.

    Returns:
        Function from a tensor's name to its merged values, without `scaling`, in one section.
    """
    ends = list(itertools.accumulate(sizes.values()))
    values = np.empty((len(reads), ends[-1]), np.float32)
    for row, read in zip(values, reads, strict=True):
        start = 0
        for part in (part for name in sizes for part in read(name)):
            row[start : start + len(part)] = part
            start += len(part)
    merged = method.merge(values, method.source_weights(len(reads)))
    values_of = dict(zip(sizes, np.split(merged, ends[:-1]), strict=True))
    return lambda name: iter([values_of[name]])
