"""task_vectors/merging/task_arithmetic.py: against numpy's weighted sum. Oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from merge_sources import sources

from compresskit.task_vectors.merging.task_arithmetic import TaskArithmetic


@given(sources())
def test_task_arithmetic_is_the_weighted_sum(given_sources: tuple[np.ndarray, np.ndarray]) -> None:
    values, weights = given_sources
    np.testing.assert_allclose(TaskArithmetic().merge(values, weights), weights @ values, atol=1e-5)
