"""Build the steps of a fine-tuning: the samples, their micro-batches and their tensors.

The order is decided before training starts, so a resumed run sees the same steps as an uninterrupted one.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compresskit.machine.precision import Precision
from compresskit.recovery.cost import MICRO_BATCH_TOKENS
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.training.distillation import TeacherPredictions, with_hard_targets

MicroBatches = list[list[int]]
"""Micro-batches of one optimiser step, as positions of samples."""
Grouping = Callable[[Sequence[int], Sequence[int]], MicroBatches]
"""Called with a step's samples, longest first, and the lengths of all samples."""
History = list[dict[str, float]]
"""For every step its mean "loss" in nats, or as a relative error of hidden states, and the number of learned "tokens"."""


@dataclass(frozen=True)
class TrainingData:
    """Training samples, their order and the learning rate."""

    samples: Sequence[Sample]
    whole: Sequence[bool]
    """Whether all tokens of a sample are learned, not only its response."""
    steps: Sequence[MicroBatches]
    teacher: TeacherPredictions | None
    hard_weights: Sequence[float]
    """Weight of each sample's own next tokens relative to the teacher's predictions, 0 to 1."""
    learning_rate: float
    seed: int
    checkpoint_steps: int
    precision: Precision
    packed: bool = False
    """Whether a micro-batch packs its samples into one row (packing.py) instead of a padded rectangle."""
    code_distance: float = 0.0
    """Total distance that the latent of a grid's code can move, in steps of the grid."""


def order_of(samples: int, batch_size: int, epochs: float, steps: int, seed: int) -> list[list[int]]:
    """Samples of every optimiser step, shuffled anew in each epoch. `steps` is 0 for as many as the epochs take."""
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


def steps_of(lengths: Sequence[int], order: Sequence[Sequence[int]], group: Grouping) -> list[MicroBatches]:
    """The steps of `order_of`, with each step's samples grouped into micro-batches by `group`."""
    return [group(sorted(chosen, key=lambda i: (-lengths[i], i)), lengths) for chosen in order]


def rectangles(longest_first: Sequence[int], lengths: Sequence[int], most_tokens: int = MICRO_BATCH_TOKENS) -> MicroBatches:
    """Micro-batches for padding: samples of similar length, as many as stay below the bound."""
    step: MicroBatches = []
    for index in longest_first:
        if not step or (len(step[-1]) + 1) * lengths[step[-1][0]] > most_tokens:
            step.append([])
        step[-1].append(index)
    return step


def rows(longest_first: Sequence[int], lengths: Sequence[int], most_tokens: int = MICRO_BATCH_TOKENS) -> MicroBatches:
    """Micro-batches without padding, with similar numbers of tokens: as few as the bound allows, more if they do not fit."""
    step: MicroBatches = [[] for _ in range(math.ceil(sum(lengths[i] for i in longest_first) / most_tokens))]
    for index in longest_first:
        emptiest = min(step, key=lambda row: sum(lengths[i] for i in row))
        if emptiest and sum(lengths[i] for i in emptiest) + lengths[index] > most_tokens:
            step.append(emptiest := [])
        emptiest.append(index)
    return [row for row in step if row]


def collate(data: TrainingData, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a step, as `batch_of` builds them."""
    return [batch_of(data, members) for members in data.steps[step]]


def batch_of(data: TrainingData, members: Sequence[int]) -> dict[str, Tensor]:
    """Build a micro-batch of these samples.

    Returns:
        Its "tokens" (samples, length), the columns "kept" for which logits are computed, the "rows" and "columns" (places,) of
        the learned logits, and their "targets" (places,), all int64; with a teacher also its "top" tokens and their
        log-probabilities "values", (places, width) each. Packed samples have "tokens" (1, length), and "positions" of that
        shape that restart with each sample.
    """
    samples = [data.samples[i] for i in members]
    counts = [len(sample.tokens) for sample in samples]
    starts = [1 if data.whole[i] else max(1, data.samples[i].response_start) for i in members]
    places = [torch.arange(start - 1, count - 1) for start, count in zip(starts, counts, strict=True)]
    batch = (_row if data.packed else _rectangle)([torch.tensor(sample.tokens) for sample in samples], places)
    batch["targets"] = batch["tokens"][batch["rows"], batch["columns"] + 1]
    batch["kept"], batch["columns"] = torch.unique(batch["columns"], return_inverse=True)
    if data.teacher is not None:
        read = [data.teacher.read(i) for i in members]
        top = torch.cat([top[place] for (top, _), place in zip(read, places, strict=True)])
        values = torch.cat([values[place] for (_, values), place in zip(read, places, strict=True)])
        weights = torch.cat([torch.full((len(place),), data.hard_weights[i]) for i, place in zip(members, places, strict=True)])
        batch["top"], batch["values"] = with_hard_targets(top, values, batch["targets"], weights)
    return batch


def _rectangle(texts: list[Tensor], places: list[Tensor]) -> dict[str, Tensor]:
    """Pad texts on the right; the places become rows and columns."""
    rows = torch.cat([torch.full_like(place, row) for row, place in enumerate(places)])
    return {"tokens": pad_sequence(texts, batch_first=True), "rows": rows, "columns": torch.cat(places)}


def _row(texts: list[Tensor], places: list[Tensor]) -> dict[str, Tensor]:
    """Concatenate texts in one row, with the places in that row."""
    before = [0, *itertools.accumulate(len(text) for text in texts)]
    columns = torch.cat([place + start for place, start in zip(places, before[:-1], strict=True)])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return {"tokens": torch.cat(texts)[None], "positions": positions[None], "rows": torch.zeros_like(columns), "columns": columns}
