"""What a fine-tuning sees, step by step, as tensors: texts in rows or rectangles, and where in them something is learned."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compresskit.machine.precision import Precision
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.training.distillation import Teacher, with_hard_targets
from compresskit.recovery.training.schedule import Step


@dataclass(frozen=True)
class Course:
    """What is trained on, in which order, how fast."""

    samples: Sequence[Sample]
    whole: Sequence[bool]
    """Whether every token of a sample counts, not only its response."""
    steps: Sequence[Step]
    teacher: Teacher | None
    width: int
    """Tokens that the teacher keeps of a position."""
    hard_weights: Sequence[float]
    """Of each sample: how much its own next tokens count beside the teacher's predictions, 0 to 1."""
    learning_rate: float
    seed: int
    checkpoint_steps: int
    precision: Precision
    packed: bool = False
    """Whether the samples of a micro-batch stand in one row (packing.py), not in a padded rectangle."""


def collate(course: Course, step: int) -> list[dict[str, Tensor]]:
    """The micro-batches of a step.

    Returns:
        For each its "tokens" (samples, length), the columns "kept" of which logits are made, the "rows" and "columns"
        (places,) of those logits that are learned, and their "targets" (places,), all int64; with a teacher also its "top"
        tokens and their log-probabilities "values", (places, width) each. Packed samples have "tokens" (1, length), and
        "positions" of that shape that begin again with each.
    """
    found = []
    for members in course.steps[step]:
        samples = [course.samples[i] for i in members]
        counts = [len(sample.tokens) for sample in samples]
        starts = [1 if course.whole[i] else max(1, course.samples[i].response_start) for i in members]
        places = [torch.arange(start - 1, count - 1) for start, count in zip(starts, counts, strict=True)]
        batch = (_row if course.packed else _rectangle)([torch.tensor(sample.tokens) for sample in samples], places)
        batch["targets"] = batch["tokens"][batch["rows"], batch["columns"] + 1]
        batch["kept"], batch["columns"] = torch.unique(batch["columns"], return_inverse=True)
        if course.teacher is not None:
            read = [course.teacher.read(i, course.width) for i in members]
            top = torch.cat([top[place] for (top, _), place in zip(read, places, strict=True)])
            values = torch.cat([values[place] for (_, values), place in zip(read, places, strict=True)])
            weights = torch.cat(
                [torch.full((len(place),), course.hard_weights[i]) for i, place in zip(members, places, strict=True)]
            )
            batch["top"], batch["values"] = with_hard_targets(top, values, batch["targets"], weights)
        found.append(batch)
    return found


def _rectangle(texts: list[Tensor], places: list[Tensor]) -> dict[str, Tensor]:
    rows = torch.cat([torch.full_like(place, row) for row, place in enumerate(places)])
    return {"tokens": pad_sequence(texts, batch_first=True), "rows": rows, "columns": torch.cat(places)}


def _row(texts: list[Tensor], places: list[Tensor]) -> dict[str, Tensor]:
    before = [0, *itertools.accumulate(len(text) for text in texts)]
    columns = torch.cat([place + start for place, start in zip(places, before[:-1], strict=True)])
    positions = torch.cat([torch.arange(len(text)) for text in texts])
    return {"tokens": torch.cat(texts)[None], "positions": positions[None], "rows": torch.zeros_like(columns), "columns": columns}
