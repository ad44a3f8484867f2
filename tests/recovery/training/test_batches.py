"""recovery/training/batches.py: the order of a course, its bounds (property), targets at every token (oracle)."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recovery_data import samples_of

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.recovery.forward import open_walk
from compresskit.recovery.training.batches import TrainingData, collate, order_of, rectangles, rows, steps_of
from compresskit.recovery.training.distillation import predict, with_hard_targets

CPU = torch.device("cpu")


@pytest.mark.parametrize("packed", [True, False])
def test_hard_targets_are_mixed_in_at_every_token_of_the_samples_that_have_a_weight(
    tiny: dict[str, Path], tmp_path: Path, packed: bool
) -> None:
    samples = samples_of()
    teacher = predict(open_walk(open_model(tiny["llama"]), Where(CPU, torch.float32)), samples, range(4), tmp_path / "teacher")
    weights = [0.5, 0.0, 1.0, 0.25]
    # Two micro-batches of two samples each: weights go with the samples, not with their places.
    steps = [[(3, 0), (1, 2)]]
    learned = TrainingData(samples, [True] * 4, steps, teacher, weights, 1e-3, 0, 20, "float32", packed)
    for members, batch in zip(steps[0], collate(learned, 0), strict=True):
        ends = [len(samples[i].tokens) - 1 for i in members]
        for i, top, values in zip(members, batch["top"].split(ends), batch["values"].split(ends), strict=True):
            before = teacher.read(i)
            targets = torch.tensor(samples[i].tokens[1:])
            expected = with_hard_targets(*before, targets, torch.full((ends[members.index(i)],), weights[i]))
            assert torch.equal(top, expected[0])
            assert torch.equal(values, expected[1])
            said = values.exp()[top == targets[:, None]]
            assert weights[i] == 0 or (len(said) == len(targets) and bool((said >= weights[i] - 1e-6).all()))


@given(
    st.lists(st.integers(1, 900), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 12),
    st.sampled_from([300, 1024, 4096]),
)
def test_a_course_shows_every_sample_before_any_twice_in_bounded_micro_batches(
    lengths: list[int], batch: int, steps: int, most: int
) -> None:
    order = order_of(len(lengths), batch, 1.0, steps, 0)
    padded = steps_of(lengths, order, partial(rectangles, most_tokens=most))
    packed = steps_of(lengths, order, partial(rows, most_tokens=most))
    assert len(padded) == len(packed) == steps
    seen = [i for step in padded for micro in step for i in micro]
    counts = np.bincount(seen, minlength=len(lengths))
    assert counts.max() - counts.min() <= 1 + (batch > len(lengths))
    for micro in (micro for step in padded for micro in step):
        assert len(micro) == 1 or len(micro) * max(lengths[i] for i in micro) <= most
    for micro in (micro for step in packed for micro in step):
        assert len(micro) == 1 or sum(lengths[i] for i in micro) <= most
    for rectangular, rowed in zip(padded, packed, strict=True):
        assert sorted(itertools.chain(*rectangular)) == sorted(itertools.chain(*rowed))
        assert all(rowed)
