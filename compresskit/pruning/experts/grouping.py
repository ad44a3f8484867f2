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


def join_nearest(similarity: Sequence[Sequence[float]], cores: Sequence[int]) -> list[list[int]]:
    """Each core with the experts that are most alike it; of equal ones the first.

    Returns:
        The groups in the order of `cores`, the core first, the others ascending.
    """
    groups = {core: [core] for core in cores}
    for expert in range(len(similarity)):
        if expert not in groups:
            groups[max(cores, key=lambda core: (similarity[expert][core], -core))].append(expert)
    return [groups[core] for core in cores]


def take_nearest(
    scores: Sequence[float], similarity: Sequence[Sequence[float]], cores: Sequence[int], size: int
) -> list[list[int]]:
    """Let each core, in falling score, take up to `size` - 1 most alike experts that no other has taken.

    Returns:
        As `join_nearest`. Experts are left over if there are more than `size` for each core.
    """
    groups = {core: [core] for core in cores}
    left = [expert for expert in range(len(scores)) if expert not in groups]
    for core in sorted(cores, key=lambda core: (-scores[core], core)):
        taken = sorted(left, key=lambda expert: (-similarity[core][expert], expert))[: size - 1]
        groups[core] += sorted(taken)
        left = [expert for expert in left if expert not in taken]
    return [groups[core] for core in cores]
