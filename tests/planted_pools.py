"""Pools of samples with planted clusters, for the tests of selections."""

from __future__ import annotations

import numpy as np
import torch

from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.method import Lost, Pool

CLUSTERS = 3


def blobs(size: int = 40) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.eye(CLUSTERS, 8) * 4
    points = torch.cat([centre + 0.3 * torch.randn(size, 8, generator=generator) for centre in centres])
    return points, np.repeat(np.arange(CLUSTERS), size)


def pool_of(
    texts: list[str], lengths: list[int], jsd: list[float], vectors: torch.Tensor, losses: list[float] | None = None
) -> Pool:
    samples = [
        Sample(Instruction(i, "f", [{"role": "user", "content": text}], "yes", f"s{i % 2}"), [1] * length, 1)
        for i, (text, length) in enumerate(zip(texts, lengths, strict=True))
    ]
    return Pool(samples, 0, lambda _: vectors, lambda: Lost(jsd, losses or jsd), lambda: ["seven quiet engineers"] * 3)


def planted_pool() -> Pool:
    points, planted = blobs(20)
    texts = [f"topic{k} item{i}" for i, k in enumerate(planted)]
    return pool_of(texts, [10 + i % 7 for i in range(len(texts))], [0.3 if k == 1 else 0.05 for k in planted], points)
