"""Samples that are never trained on: a share of each data source, and their response loss before and after. Loads no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compresskit.recovery.data.encoding import Sample

if TYPE_CHECKING:
    from compresskit.walk.walk import Walk


def hold_back(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(the pool, those held back): `share` of every source of every file, rounded, so that a small one may give none."""
    by_source: dict[tuple[str, str], list[int]] = {}
    for index, sample in enumerate(samples):
        by_source.setdefault((sample.instruction.file, sample.instruction.source), []).append(index)
    generator = random.Random(seed)  # noqa: S311
    held = {i for members in by_source.values() for i in generator.sample(members, round(share * len(members)))}
    pool = [sample for index, sample in enumerate(samples) if index not in held]
    return pool, [samples[index] for index in sorted(held)]


def mean_losses(walk: Walk, samples: Sequence[Sample], clusters: Sequence[int] | None) -> dict[str, Any]:
    """Response losses of all samples, of those of each file, and of each cluster where there are any.

    Returns:
        In nats: "loss", "by_file" and "by_cluster", means over samples, so that an answer of one word weighs as much as a
        page; "loss_by_token", the mean over all their tokens.
    """
    from compresskit.recovery.forward import response_losses

    losses = dict(response_losses(walk, samples))
    counts = [sample.response_tokens for sample in samples]
    found = {
        "loss": sum(losses.values()) / len(losses),
        "loss_by_token": sum(loss * counts[i] for i, loss in losses.items()) / sum(counts),
        "by_file": _means(losses, [sample.instruction.file for sample in samples]),
    }
    return found if clusters is None else found | {"by_cluster": _means(losses, [str(k) for k in clusters])}


def _means(losses: dict[int, float], names: Sequence[str]) -> dict[str, float]:
    """Mean loss by the samples' names, which JSON keeps as keys."""
    found: dict[str, list[float]] = {}
    for index, loss in losses.items():
        found.setdefault(names[index], []).append(loss)
    return {name: sum(each) / len(each) for name, each in sorted(found.items())}
