"""Time Matrix Nuclear-Norm against Matrix Entropy on the same hidden states; exit code 1 below eight times faster.

    python benchmarks/nuclear_norm.py

The two alternate, so that a busy machine slows both; the ratio printed is the median of the pairwise ratios.
The comparator decomposes the smaller Gram matrix; the paper's own code decomposes the (hidden, hidden) one, which
is slower still.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from compresskit.evaluation.nuclear_norm import matrix_entropy, matrix_nuclear_norm

TOKENS, HIDDEN = 1024, 4096
ROUNDS = 7
REQUIRED_RATIO = 8.0
"""The smallest speed-up that the paper reports (arXiv 2410.10672, abstract)."""


def seconds(measure: Callable[[Tensor], float], hidden: Tensor) -> float:
    start = time.perf_counter()
    measure(hidden)
    return time.perf_counter() - start


def main() -> int:
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(0))
    pairs = [(seconds(matrix_nuclear_norm, hidden), seconds(matrix_entropy, hidden)) for _ in range(ROUNDS + 1)][1:]
    ratio = statistics.median(entropy / norm for norm, entropy in pairs)
    norm_ms, entropy_ms = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"({TOKENS}, {HIDDEN}): nuclear norm {norm_ms:.1f} ms, matrix entropy {entropy_ms:.1f} ms, ratio {ratio:.1f}")
    return 0 if ratio >= REQUIRED_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
