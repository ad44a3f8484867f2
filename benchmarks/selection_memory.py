"""Time and memory of a selection without the two models' passes, at several sizes of the pool; one JSON line a size.

    python benchmarks/selection_memory.py [SIZE...]

Texts are words drawn by Zipf's law, vectors those of a mixture of 40 Gaussians in 576 dimensions: what is measured does
not depend on what they say. Each size runs in a process of its own; memory is the process's peak, libraries included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import numpy as np
import torch

from compresskit.machine.memory import peak_memory_bytes
from compresskit.recovery.data.duplicates import drop_duplicates
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.method import Lost, Pool
from compresskit.recovery.selection.embeddings import centred
from compresskit.recovery.selection.paser import Paser

SIZES = (5_000, 10_000, 20_000, 50_000)
WIDTH, TOPICS, VOCABULARY = 576, 40, 30_000


def measure(size: int) -> dict[str, object]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(20, 120, size)
    numbers = (generator.zipf(1.3, int(lengths.sum())) % VOCABULARY).astype(np.int64)
    ends = np.cumsum(lengths)
    texts = [" ".join(f"w{_letters(n)}" for n in numbers[end - count : end]) for end, count in zip(ends, lengths, strict=True)]
    started = time.monotonic()
    kept, _ = drop_duplicates(texts)
    deduplicated = time.monotonic()
    samples = [
        Sample(Instruction(i, "f", [{"role": "user", "content": texts[i]}], "yes", "s"), [1] * len(texts[i].split()), 1)
        for i in kept
    ]
    topics = torch.from_numpy(generator.integers(0, TOPICS, len(kept)))
    torch.manual_seed(0)
    vectors = centred(torch.randn(TOPICS, WIDTH)[topics] + torch.randn(len(kept), WIDTH))
    divergences = generator.random(len(kept)).tolist()
    selection = Paser(budget=0.1).select(Pool(samples, 0, lambda _: vectors, lambda: Lost(divergences, divergences), list))
    ended = time.monotonic()
    return {
        "samples": size, "selected": len(selection.choices), "clusters": len(selection.facts["clusters"]),
        "seconds_duplicates": round(deduplicated - started, 1), "seconds_selection": round(ended - deduplicated, 1),
        "cpu_seconds": round(time.process_time(), 1), "peak_gb": round(peak_memory_bytes() / 1e9, 3),
    }  # fmt: skip


def _letters(number: int) -> str:
    return "".join(chr(97 + int(digit)) for digit in str(number))


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(int(sys.argv[2]))), flush=True)
        return
    for size in [int(argument) for argument in sys.argv[1:]] or SIZES:
        subprocess.run([sys.executable, __file__, "--one", str(size)], check=True)


if __name__ == "__main__":
    main()
