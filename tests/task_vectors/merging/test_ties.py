"""task_vectors/merging/ties.py: against a slow statement of its definition, an entry at a time. Oracle."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from merge_sources import sources

from compresskit.task_vectors.merging.ties import Ties


def ties_by_entry(column: np.ndarray, weights: np.ndarray) -> float:
    mass = sum(w * v for w, v in zip(weights, column, strict=True))
    agreeing = [(w, v) for w, v in zip(weights, column, strict=True) if v * mass > 0]
    return sum(w * v for w, v in agreeing) / sum(w for w, _ in agreeing) if agreeing else 0.0


@given(sources())
def test_ties_averages_those_that_agree_with_the_elected_sign(given_sources: tuple[np.ndarray, np.ndarray]) -> None:
    values, weights = given_sources
    clear = np.abs(weights.astype(np.float64) @ values) > 1e-5
    expected = [ties_by_entry(column, weights.astype(np.float64)) for column in values.T.astype(np.float64)]
    np.testing.assert_allclose(Ties().merge(values, weights)[clear], np.array(expected)[clear], atol=1e-5)
