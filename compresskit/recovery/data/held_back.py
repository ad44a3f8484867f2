"""Held-back samples: a share of each data source, never trained on, to measure the response loss."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from compresskit.recovery.data.encoding import Sample

if TYPE_CHECKING:
    from compresskit.walk.walk import Walk


def hold_back(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Return (pool, held-back samples): `share` of every source in every file, rounded, so that a small source may give none."""
    by_source: dict[tuple[str, str], list[int]] = {}
    for index, sample in enumerate(samples):
        by_source.setdefault((sample.instruction.file, sample.instruction.source), []).append(index)
    generator = random.Random(seed)  # noqa: S311
    held = {i for members in by_source.values() for i in generator.sample(members, round(share * len(members)))}
    pool = [sample for index, sample in enumerate(samples) if index not in held]
    return pool, [samples[index] for index in sorted(held)]


def mean_losses(walk: Walk, samples: Sequence[Sample], clusters: Sequence[int] | None) -> dict[str, Any]:
    """Response losses of all samples, by file and, if given, by cluster.

    Returns:
        In nats: "loss", "by_file" and "by_cluster" are means over samples, in which long and short responses weigh the same;
        "loss_by_token" is the mean over all tokens.
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
    """Mean loss by name; names are strings, so that they can be JSON keys."""
    found: dict[str, list[float]] = {}
    for index, loss in losses.items():
        found.setdefault(names[index], []).append(loss)
    return {name: sum(each) / len(each) for name, each in sorted(found.items())}
