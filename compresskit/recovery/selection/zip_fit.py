"""zip-fit: select samples that a compressor finds most similar to the target text.

ZIP-FIT, arXiv 2410.18194, eq. 1 and 2, with C the size under gzip:

    NCD(x, y) = (C(xy) - min(C(x), C(y))) / max(C(x), C(y))
    alignment(x) = 1 - mean over target texts y of NCD(x, y)

Differs from the paper: the target is the calibration text, by default text from the original model itself. Only its first
`targets` texts are used, because each pair costs one compression.
"""

from __future__ import annotations

import statistics
import zlib
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from compresskit.recovery.method import BudgetMethod, Choice, Pool, Selection

LEVEL = 6
"""gzip's default level."""


def compressed_bytes(text: bytes) -> int:
    """Size under deflate, which is gzip without its header."""
    return len(zlib.compress(text, LEVEL))


def distance(first: bytes, second: bytes, sizes: tuple[int, int]) -> float:
    """Normalised compression distance; `sizes`: compressed sizes of the two texts alone."""
    return (compressed_bytes(first + second) - min(sizes)) / max(sizes)


def alignments(texts: Sequence[bytes], targets: Sequence[bytes]) -> list[float]:
    """1 minus the mean distance from the targets, for every text."""
    target_sizes = [compressed_bytes(target) for target in targets]
    found = []
    for text in texts:
        size = compressed_bytes(text)
        pairs = zip(targets, target_sizes, strict=True)
        found.append(1 - statistics.fmean(distance(text, target, (size, other)) for target, other in pairs))
    return found


class ZipFit(BudgetMethod):
    """Alignment under gzip with the calibration text."""

    targets: Annotated[int, Field(ge=1)] = 16
    """Number of target texts to compare with every sample."""

    def select(self, pool: Pool) -> Selection:
        """Compute every alignment and take the best."""
        targets = [text.encode("utf-8", "surrogatepass") for text in pool.target()[: self.targets]]
        scores = alignments([s.instruction.text.encode("utf-8", "surrogatepass") for s in pool.samples], targets)
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[: self.count(pool)]
        return Selection([Choice(i, "compresses best with the target text", score=scores[i]) for i in best])
