"""task_vectors/merging/average.py: against numpy's weighted mean. Oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from merge_sources import sources

from compresskit.task_vectors.merging.average import Average


@given(sources())
def test_the_average_is_the_weighted_mean(given_sources: tuple[np.ndarray, np.ndarray]) -> None:
    values, weights = given_sources
    np.testing.assert_allclose(Average().merge(values, weights), np.average(values, axis=0, weights=weights), atol=1e-5)
