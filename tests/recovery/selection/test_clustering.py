"""recovery/selection/clustering.py, recovery/selection/kmeans.py: against planted structure and whole distances. Oracle."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from planted_pools import CLUSTERS, blobs

from compresskit.errors import NumericalError
from compresskit.recovery.selection.clustering import diffusion_clusters, eigengap, kmeans, nearest


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    return len(set(zip(first.tolist(), second.tolist(), strict=True))) == len(set(first.tolist())) == len(set(second.tolist()))


def test_nearest_neighbours_are_those_of_the_whole_distance_matrix() -> None:
    points, _ = blobs(10)
    distances = torch.cdist(points, points).fill_diagonal_(torch.inf)
    indices, squared = nearest(points, 4)
    assert torch.allclose(squared.sqrt(), distances.topk(4, largest=False).values, atol=1e-3)
    assert torch.equal(indices.sort().values, distances.topk(4, largest=False).indices.sort().values)


def test_planted_clusters_and_their_number_are_found() -> None:
    pytest.importorskip("scipy")
    points, planted = blobs()
    assert same_partition(diffusion_clusters(points, 0, 10, 8, seed=0), planted)
    assert same_partition(kmeans(points, CLUSTERS, seed=0), planted)


def test_rings_that_k_means_cannot_tell_apart_are_clusters_of_the_neighbour_graph() -> None:
    pytest.importorskip("scipy")
    angles = torch.linspace(0, 2 * math.pi, 121)[:-1]
    ring = torch.stack([angles.cos(), angles.sin()], dim=1)
    points, planted = torch.cat([ring, 3 * ring]), np.repeat([0, 1], 120)
    assert same_partition(diffusion_clusters(points, 2, 6, 8, seed=0), planted)
    assert not same_partition(kmeans(points, 2, seed=0), planted)


def test_the_eigengap_is_where_the_spectrum_falls_most() -> None:
    assert eigengap(np.array([1.0, 0.99, 0.98, 0.5, 0.4])) == 3


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_sparse_solver_that_runs_out_of_vectors_is_given_more(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many equal samples in a small graph do that to it, by the rounding of the machine."""
    solver = pytest.importorskip("scipy.sparse.linalg")
    eigsh, asked = solver.eigsh, []

    def failing(operator: object, ncv: int, **how: Any) -> tuple[np.ndarray, np.ndarray]:
        asked.append(ncv)
        if len(asked) <= failures:
            raise solver.ArpackError(3)
        found: tuple[np.ndarray, np.ndarray] = eigsh(operator, ncv=ncv, **how)
        return found

    failing.__signature__ = inspect.signature(eigsh)  # type: ignore[attr-defined]
    points, planted = blobs(20)
    monkeypatch.setattr("compresskit.recovery.selection.clustering.DENSE_SAMPLES", 0)
    monkeypatch.setattr(solver, "eigsh", failing)
    if failures == 3:
        with pytest.raises(NumericalError, match="--cluster-by kmeans"):
            diffusion_clusters(points, CLUSTERS, 10, 8, 0)
    else:
        assert same_partition(diffusion_clusters(points, CLUSTERS, 10, 8, 0), planted)
    assert asked == [19, 37, 60][: failures + 1]
