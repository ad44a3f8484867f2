"""Which samples an optimiser step sees, and which of them are computed together. Loads no torch.

The order is decided before training starts, so that a resumed run sees what the interrupted one would have seen.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

MICRO_BATCH_TOKENS = 1024
"""Bound on the tokens, padding included, of a forward and backward pass; in bfloat16 the logits of so many take 100 MB at 49,152
words. Twice as many are 4% faster on SmolLM2-135M and take 1.2 GB more."""
ACCELERATOR_MICRO_BATCH_TOKENS = 4096
"""The same bound on an accelerator, whose time goes into starting kernels rather than into small products."""

CURVE_POINTS = 40
MARKS = "▁▂▃▄▅▆▇█"

Step = list[list[int]]
"""Micro-batches of one optimiser step, as positions of samples."""
Grouping = Callable[[Sequence[int], Sequence[int]], Step]
"""Called with a step's samples, the longest first, and the lengths of all."""


def rectangles(longest_first: Sequence[int], lengths: Sequence[int], most_tokens: int = MICRO_BATCH_TOKENS) -> Step:
    """Micro-batches to be padded: samples of like length, as many as stay below the bound."""
    step: Step = []
    for index in longest_first:
        if not step or (len(step[-1]) + 1) * lengths[step[-1][0]] > most_tokens:
            step.append([])
        step[-1].append(index)
    return step


def rows(longest_first: Sequence[int], lengths: Sequence[int], most_tokens: int = MICRO_BATCH_TOKENS) -> Step:
    """Micro-batches without padding, of like numbers of tokens: as few as the bound allows, more where they do not fit."""
    step: Step = [[] for _ in range(math.ceil(sum(lengths[i] for i in longest_first) / most_tokens))]
    for index in longest_first:
        emptiest = min(step, key=lambda row: sum(lengths[i] for i in row))
        if emptiest and sum(lengths[i] for i in emptiest) + lengths[index] > most_tokens:
            step.append(emptiest := [])
        emptiest.append(index)
    return [row for row in step if row]


def order_of(samples: int, batch_size: int, epochs: float, steps: int, seed: int) -> list[list[int]]:
    """The samples of every optimiser step: each epoch a new shuffle. `steps`: 0 for as many as the epochs take."""
    wanted = steps or max(1, math.ceil(epochs * samples / batch_size))
    generator = random.Random(seed)  # noqa: S311
    queue: list[int] = []
    found: list[list[int]] = []
    while len(found) < wanted:
        if len(queue) < min(batch_size, samples):
            order = list(range(samples))
            generator.shuffle(order)
            queue += order
        chosen, queue = queue[:batch_size], queue[batch_size:]
        found.append(chosen)
    return found


def steps_of(lengths: Sequence[int], order: Sequence[Sequence[int]], group: Grouping) -> list[Step]:
    """The steps of `order_of`, the samples of each in micro-batches by `group`."""
    return [group(sorted(chosen, key=lambda i: (-lengths[i], i)), lengths) for chosen in order]


def loss_curve(losses: Sequence[float]) -> str:
    """The losses of all steps as one line of at most `CURVE_POINTS` marks, each a mean, the lowest to the highest."""
    points = min(CURVE_POINTS, len(losses))
    bounds = [len(losses) * i // points for i in range(points + 1)] if points else []
    means = [sum(losses[first:last]) / (last - first) for first, last in itertools.pairwise(bounds)]
    low, width = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(MARKS[round((mean - low) / width * (len(MARKS) - 1)) if width else 0] for mean in means)
