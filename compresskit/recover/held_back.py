"""Samples that are never trained on: a share of each data source, and their response loss before and after. Loads no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compresskit.recover.encoding import Sample

if TYPE_CHECKING:
    from compresskit.walk import Walk


def hold_back(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(the pool, those held back): `share` of every file, rounded, so that a small file may give none."""
    by_file: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_file.setdefault(sample.instruction.file, []).append(index)
    generator = random.Random(seed)  # noqa: S311
    held = {i for members in by_file.values() for i in generator.sample(members, round(share * len(members)))}
    pool = [sample for index, sample in enumerate(samples) if index not in held]
    return pool, [samples[index] for index in sorted(held)]


def mean_losses(walk: Walk, samples: Sequence[Sample]) -> dict[str, Any]:
    """Mean response loss in nats of all samples, and of those of each file."""
    from compresskit.recover.passes import response_losses

    losses = dict(response_losses(walk, samples))
    by_file: dict[str, list[float]] = {}
    for index, loss in losses.items():
        by_file.setdefault(samples[index].instruction.file, []).append(loss)
    return {
        "loss": sum(losses.values()) / len(losses),
        "by_file": {name: sum(found) / len(found) for name, found in sorted(by_file.items())},
    }
