"""Factorisations with the same bytes for any number of threads.

LAPACK splits a matrix by the number of threads, and rounds otherwise for each split. Matrix products and sums along one axis
do not depend on it, as far as docs/determinism.md says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ONE_THREAD_SIDE = 2048
"""Largest side of a matrix that LAPACK factorises in one thread. On two cores, two threads save
nothing there: Cholesky of 2,048 takes 0.42 s with either, eigh of 1,024 takes 0.7 s with one and 1.7 s with two that other jobs
disturb. Not measured on more cores."""


def in_one_thread(factorised: Callable[..., Any], matrix: Tensor, **settings: Any) -> Any:
    """A function of torch.linalg of a matrix; a matrix with a side above 2,048 keeps all threads, and depends on them."""
    threads = torch.get_num_threads()
    if min(matrix.shape) > ONE_THREAD_SIDE:
        return factorised(matrix, **settings)
    torch.set_num_threads(1)
    try:
        return factorised(matrix, **settings)
    finally:
        torch.set_num_threads(threads)
