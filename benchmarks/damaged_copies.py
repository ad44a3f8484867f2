"""The loop of archive_fuzz.py and ternary_fuzz.py: read many damaged copies of a file, each the original or a clean error."""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from compresskit.errors import CheckpointError
from compresskit.machine.memory import peak_memory_bytes


def run(
    description: str | None,
    made: Callable[[Path], tuple[bytes, object]],
    kinds: tuple[str, ...],
    mutated: Callable[[bytes, str, int, int], bytes],
    read: Callable[[Path], object],
) -> None:
    """Parse the flags, damage and read the copies, print a JSON line.

    `made`: makes the file in an empty folder; returns its bytes, and what `read` finds in it. `kinds`: in turn, the second
    argument of `mutated`.

    Raises:
        AssertionError: a damaged copy was read as something else, or its error has several lines.
        Exception: whatever else than CheckpointError the reader raises.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        original, wanted = made(Path(name))
        damaged = Path(name) / "damaged"
        before, slowest, same, errors = peak_memory_bytes(), 0.0, 0, 0
        for number in range(arguments.files):
            kind = kinds[number % len(kinds)]
            damaged.write_bytes(mutated(original, kind, generator.getrandbits(40), generator.getrandbits(40)))
            started = time.process_time()
            try:
                if read(damaged) != wanted:
                    raise AssertionError(f"file {number} of seed {arguments.seed} was read as something else")
                same += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
                errors += 1
            slowest = max(slowest, time.process_time() - started)
        print(json.dumps({"files": arguments.files, "original": same, "errors": errors, "slowest_seconds": round(slowest, 3),
                          "file_bytes": len(original), "added_memory_bytes": peak_memory_bytes() - before}))  # fmt: skip
