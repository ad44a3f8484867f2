"""Distribute one parameter budget over all linears, one rank step at a time.

    maximise sum_l sum_{i <= r_l} g_l[i]    subject to    sum_l r_l (out_l + in_l) <= budget

symbol  meaning                                                     name here
g_l[i]  error reduction of linear l by rank i, falling in i          gains[l][i]
r_l     rank of linear l

The gains fall, so the greedy choice (the step with the largest gain per parameter first, as long as it fits) is the
optimum of the problem without its last, unfilled step.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence


def allocate_ranks(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int, step: int) -> dict[str, int]:
    """Distribute a budget of parameters over linears, `step` ranks at a time.

    `gains`: by linear, one number per rank, falling. `costs`: parameters of one rank.

    Returns:
        Rank of every linear, a multiple of `step` (possibly 0), with sum(rank * cost) <= budget.
    """
    ranks = dict.fromkeys(gains, 0)
    waiting: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        following = gains[name][ranks[name] : ranks[name] + step]
        if len(following) == step and sum(following) > 0:
            heapq.heappush(waiting, (-sum(following) / (step * costs[name]), name))

    for name in gains:
        offer(name)
    while waiting:
        _, name = heapq.heappop(waiting)
        if step * costs[name] > budget:
            continue  # a narrower linear may still fit
        ranks[name] += step
        budget -= step * costs[name]
        offer(name)
    return ranks
