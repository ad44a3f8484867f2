"""Share ApiQ's training of a block among ranks: windows are dealt, and every trained tensor has one owner.

In a step each rank runs windows of that step. A linear's owner alone makes its weight of equation 2, keeps its optimiser state
and moves its parameters: half of a step's time at a width of 2,048. Weights go from owners to all, their gradients to the owners,
who add them in the order of the windows. So any number of ranks computes what one does, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from compresskit import distributed


def owners_of(sizes: Mapping[str, int]) -> dict[str, int]:
    """The rank that trains each tensor, by name: the largest first, to the rank that has the least. `sizes`: numbers in each."""
    loads = [0] * distributed.count()
    found = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        found[name] = loads.index(min(loads))
        loads[found[name]] += sizes[name]
    return found


def turns(windows: Sequence[int]) -> Iterator[Sequence[int]]:
    """Windows that run at the same time, one a rank from the first on."""
    for start in range(0, len(windows), distributed.count()):
        yield windows[start : start + distributed.count()]


def add_gradients(leaves: Mapping[str, Tensor], owners: Mapping[str, int], turn: int, sums: dict[str, Tensor]) -> None:
    """Add the gradients of the `turn` windows that have just run to their owners' sums, window by window.

    A leaf that no window reached, as an expert without tokens, has no gradient. Alone, autograd has added them already.
    """
    if distributed.count() == 1:
        sums |= {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return
    reached = distributed.every([name for name, leaf in leaves.items() if leaf.grad is not None])
    for name, leaf in leaves.items():
        sources = [source for source in range(turn) if name in reached[source]]
        found = distributed.add_in_order(sums.get(name), leaf.detach(), leaf.grad, sources, owners[name])
        if found is not None:
            sums[name] = found
        leaf.grad = None
