"""Find the largest entries of a whole vector in passes over its tensors, with one section in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from compresskit.formats.ternary.threshold import Spread, Threshold, Values

Sections = Callable[[str], Iterator[Values]]
"""Function from a tensor's name to its values, flat float32, one section at a time."""


def find_threshold(
    sections: Sections, names: list[str], density: float, on_tensor: Callable[[int, int], None] | None = None
) -> tuple[Spread, Threshold]:
    """Find the threshold of this share of all entries in two passes over the tensors.

    `on_tensor` is called with (tensors done, of both passes) before each tensor and at the end.

    Returns:
        The spread of the vector, and the threshold, which can cut the same sections in the same order.
    """
    total = 2 * len(names)
    on_tensor = on_tensor or (lambda done, total: None)
    spread = Spread()
    for number, name in enumerate(names):
        on_tensor(number, total)
        for values in sections(name):
            spread.add(values)
    threshold = Threshold(spread, density)
    for number, name in enumerate(names, start=len(names)):
        on_tensor(number, total)
        for values in sections(name):
            threshold.add(values)
    on_tensor(total, total)
    threshold.settle()
    return spread, threshold


def trimmed(sections: Sections, names: list[str], density: float) -> Sections:
    """Zero all but this share of the vector's largest entries.

    Returns:
        The sections; each tensor can be read once, in the order of `names`. The given sections if the share is 1.
    """
    if density == 1:
        return sections
    _, threshold = find_threshold(sections, names, density)

    def read(name: str) -> Iterator[Values]:
        for values in sections(name):
            yield values * np.abs(threshold.cut(values))

    return read
