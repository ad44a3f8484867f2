"""Which experts stay. Pure functions of scores."""

from __future__ import annotations

from collections.abc import Sequence


def best(scores: Sequence[float], kept: int, groups: int = 1) -> list[int]:
    """Find the `kept` experts of the highest scores, as many of each of `groups` equal groups; of equal ones the first.

    Returns:
        Their numbers, ascending.
    """
    size = len(scores) // groups
    found: list[int] = []
    for start in range(0, len(scores), size):
        members = sorted(range(start, start + size), key=lambda expert: (-scores[expert], expert))
        found += members[: kept // groups]
    return sorted(found)
