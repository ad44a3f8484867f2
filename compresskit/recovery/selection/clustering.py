"""Cluster samples by the geometry of their vectors: k-means in the diffusion map of a sparse neighbour graph.

    W_ij = exp(-||x_i - x_j||^2 / (2 s^2))   for j among the k nearest of i, or i of j; s: the median neighbour distance
    P = D^-1/2 W D^-1/2                      D: row sums; its leading eigenvectors v_1 ... with l_1 >= l_2 >= ...
    coordinates of i: (l_1 v_1i, ..., l_c v_ci), scaled to length 1; c: where l_c - l_c+1 is largest

symbol  meaning               shape                        name here
x       vectors               (samples, width)             points
W, P    affinity, diffusion   sparse, samples x k entries  affinity, operator
l, v    eigenpairs            (c,), (samples, c)           values, vectors

Source: PASER, arXiv 2502.12594; diffusion maps, Coifman and Lafon 2006; normalised rows, Ng, Jordan and Weiss 2001.

Differs from the paper: W is sparse, so memory grows linearly with the number of samples, not with its square (the
released code's dense matrices take 21 GB for 52,000). k-means replaces the non-negative factorisation of W, which needs
the full matrix.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from compresskit.errors import NumericalError
from compresskit.walk.cost import FLOAT32_BYTES

NEIGHBOURS_BYTES = 1 << 26
"""Bound on one block of distances (64 MiB)."""
DENSE_SAMPLES = 1000
"""Largest number of samples for which all eigenpairs are computed, in less than a second: small graphs of many equal vectors
have few eigenvalues, which the sparse solver cannot handle."""
STARTS = 4
"""Number of k-means runs; the best is kept."""
MOST_ROUNDS = 100
LANCZOS_WIDTHS = (2, 4, 8)
"""Lanczos vectors per wanted eigenvalue, tried in turn."""

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]


def nearest(points: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the nearest other points of points (samples, width), exactly, block by block.

    Returns:
        (indices int64, squared distances), (samples, count) each, nearest first.
    """
    total = len(points)
    squares = (points**2).sum(dim=1)
    step = max(1, NEIGHBOURS_BYTES // (total * FLOAT32_BYTES))
    indices, distances = [], []
    for start in range(0, total, step):
        block = points[start : start + step]
        squared = torch.addmm(squares[None], block, points.T, alpha=-2).add_(squares[start : start + step, None])
        squared[torch.arange(len(block)), torch.arange(start, start + len(block))] = torch.inf
        closest = squared.topk(count, dim=1, largest=False)
        indices.append(closest.indices)
        distances.append(closest.values.clamp(min=0))
    return torch.cat(indices), torch.cat(distances)


def diffusion_map(points: Tensor, neighbours: int, most: int, seed: int) -> tuple[Floats, Floats]:
    """Compute the leading eigenpairs of the diffusion operator of points (samples, width).

    Returns:
        (values (c,) falling, vectors (samples, c)) float64, c = min(most, samples - 1).
    """
    from scipy import sparse

    total = len(points)
    count = min(neighbours, total - 1)
    indices, squared = nearest(points, count)
    bandwidth = float(squared.sqrt().median()) or 1.0
    weights = torch.exp(-squared.double() / (2 * bandwidth**2)).flatten().numpy()
    rows = np.repeat(np.arange(total), count)
    one_way = sparse.csr_matrix((weights, (rows, indices.flatten().numpy())), shape=(total, total))
    affinity = one_way.maximum(one_way.T)
    scale = sparse.diags(1 / np.sqrt(np.maximum(np.asarray(affinity.sum(axis=1)).ravel(), np.finfo(np.float64).tiny)))
    operator = scale @ affinity @ scale
    wanted = min(most, total - 1)
    values, vectors = _sparse(operator, wanted, seed) if total > max(DENSE_SAMPLES, wanted + 1) else _dense(operator, wanted)
    order = np.argsort(-values)
    return values[order], vectors[:, order]


def _dense(operator: Any, wanted: int) -> tuple[Floats, Floats]:
    """Compute all eigenpairs and return the `wanted` largest."""
    values, vectors = np.linalg.eigh(operator.toarray())
    return values[-wanted:], vectors[:, -wanted:]


def _sparse(operator: Any, wanted: int, seed: int) -> tuple[Floats, Floats]:
    """Compute the `wanted` largest eigenpairs with Lanczos' method.

    Returns:
        (values (wanted,), vectors (samples, wanted)).

    Raises:
        NumericalError: it does not converge, because too many samples have equal vectors.
    """
    from scipy.sparse.linalg import ArpackError, eigsh

    # A random start vector: a constant one could be orthogonal to the wanted eigenvectors.
    start = np.random.default_rng(seed).random(operator.shape[0])
    # From scipy 1.17 on, later vectors are also random; without `rng` each call uses another generator.
    drawing = {"rng": np.random.default_rng(seed)} if "rng" in inspect.signature(eigsh).parameters else {}
    for width in LANCZOS_WIDTHS:
        try:
            values, vectors = eigsh(
                operator, k=wanted, which="LA", v0=start, ncv=min(operator.shape[0], width * wanted + 1), **drawing
            )
        except ArpackError:
            continue
        return values, vectors
    raise NumericalError(
        "recover paser: the neighbour graph has no clear eigenvectors, many samples are alike; give --cluster-by kmeans"
    )


def eigengap(values: Floats) -> int:
    """Number of clusters: position of the largest gap between successive falling eigenvalues (c,); at least 2."""
    gaps = values[1:-1] - values[2:]
    return int(np.argmax(gaps)) + 2 if len(gaps) else min(2, len(values))


def diffusion_clusters(points: Tensor, clusters: int, neighbours: int, most: int, seed: int) -> Labels:
    """Assign every point to a cluster, (samples,); clusters = 0 finds their number by the eigengap, at most `most`."""
    if len(points) < 4:
        return np.zeros(len(points), dtype=np.int64)
    values, vectors = diffusion_map(points, neighbours, max(clusters, most) + 1, seed)
    chosen = min(clusters or eigengap(values), len(values))
    coordinates = values[:chosen] * vectors[:, :chosen]
    lengths = np.linalg.norm(coordinates, axis=1, keepdims=True)
    return kmeans(torch.from_numpy(coordinates / np.maximum(lengths, np.finfo(np.float64).tiny)), chosen, seed)


def kmeans(points: Tensor, clusters: int, seed: int) -> Labels:
    """k-means++ and Lloyd's algorithm, best of `STARTS`; no cluster is empty. points (samples, width) -> (samples,)."""
    clusters = min(clusters, len(points))
    generator = torch.Generator().manual_seed(seed)
    runs = [_lloyd(points, _spread_centres(points, clusters, generator)) for _ in range(STARTS)]
    labels = min(runs, key=lambda run: run[1])[0]
    found: Labels = np.unique(labels.numpy(), return_inverse=True)[1].astype(np.int64)
    return found


def _spread_centres(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: draw each centre in proportion to its squared distance from the earlier ones."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    closest = ((points - points[chosen[0]]) ** 2).sum(dim=1).double()
    while len(chosen) < clusters and float(closest.sum()) > 0:
        cumulative = closest.cumsum(dim=0)
        drawn = torch.rand(1, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen.append(min(int(torch.searchsorted(cumulative, drawn, right=True)), len(points) - 1))
        closest = torch.minimum(closest, ((points - points[chosen[-1]]) ** 2).sum(dim=1).double())
    return points[chosen].clone()


def _lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Return (labels, sum of squared distances) once no label changes."""
    labels = torch.full((len(points),), -1)
    cost = 0.0
    for _ in range(MOST_ROUNDS):
        squared = (centres**2).sum(dim=1) - 2 * points @ centres.T
        closest = squared.min(dim=1)
        cost = float((closest.values + (points**2).sum(dim=1)).double().sum())
        if torch.equal(closest.indices, labels):
            break
        labels = closest.indices
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        counts = torch.bincount(labels, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return labels, cost
