"""Split a budget over clusters: exactly, in proportion to their weights, limited to their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from compresskit.errors import RequestError


def split_budget(weights: Sequence[float], sizes: Sequence[int], budget: int) -> list[int]:
    """Split a budget over clusters: floor(budget * w_k / sum w) each, and the remainders to the largest fractions.

    The excess of full clusters goes to the others in proportion to their weights. Clusters of weight 0 get only what no other
    cluster can take. Weights are at least 0.

    Returns:
        n_k by cluster, at most its size; the sum is exactly the budget.

    Raises:
        RequestError: the budget exceeds the number of samples.
    """
    if budget > sum(sizes):
        raise RequestError(f"--budget: {budget} samples are asked for, {sum(sizes)} are there; ask for less")
    counts = [0] * len(sizes)
    exact = [Fraction(weight) for weight in weights]
    left = budget
    open_ = [k for k, size in enumerate(sizes) if size]
    while left:
        total = sum(exact[k] for k in open_)
        shares = {k: left * (exact[k] / total if total else Fraction(sizes[k], sum(sizes[j] for j in open_))) for k in open_}
        full = [k for k in open_ if shares[k] >= sizes[k]]
        if not full:
            return _rounded(counts, shares, left)
        for k in full:
            counts[k] = sizes[k]
            left -= sizes[k]
        open_ = [k for k in open_ if k not in full]
    return counts


def _rounded(counts: list[int], shares: dict[int, Fraction], left: int) -> list[int]:
    """Round by largest remainders; every share is below its cluster's size, so adding one always fits."""
    for k, share in shares.items():
        counts[k] = int(share)
    largest = sorted(shares, key=lambda k: (int(shares[k]) - shares[k], k))
    for k in largest[: left - sum(int(share) for share in shares.values())]:
        counts[k] += 1
    return counts


def members_of(labels: Sequence[int]) -> list[list[int]]:
    """Positions with each label, from 0 to the largest label; unused labels give an empty list."""
    found: list[list[int]] = [[] for _ in range(max(labels, default=-1) + 1)]
    for position, label in enumerate(labels):
        found[label].append(position)
    return found
