"""Mutate a packed folder many times and expand it: each must give the original or a clean error, fast and in little memory.

    PYTHONPATH=tests python benchmarks/archive_fuzz.py [--files 100000] [--seed 0]

Prints a JSON line: how many files gave the original and how many an error, the slowest reading, the memory that reading added.
Anything else than CheckpointError, or another content than the original's, ends the run with a traceback.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

from archive_files import content, mutated, read, small_folder, write

from compresskit.errors import CheckpointError
from compresskit.machine.memory import peak_memory_bytes

KINDS = ("flip", "cut", "swap", "lose", "end", "number", "section")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wanted = content(small_folder(folder / "source"))
        write(folder / "source", folder / "original")
        original = (folder / "original").read_bytes()
        before, slowest, same, errors = peak_memory_bytes(), 0.0, 0, 0
        for number in range(arguments.files):
            damaged = mutated(original, KINDS[number % len(KINDS)], generator.getrandbits(40), generator.getrandbits(40))
            (folder / "damaged").write_bytes(damaged)
            started = time.process_time()
            try:
                if read(folder / "damaged", folder / "out") != wanted:
                    raise AssertionError(f"file {number} of seed {arguments.seed} was read as something else")
                same += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
                errors += 1
            slowest = max(slowest, time.process_time() - started)
        print(json.dumps({"files": arguments.files, "original": same, "errors": errors, "slowest_seconds": round(slowest, 3),
                          "file_bytes": len(original), "added_memory_bytes": peak_memory_bytes() - before}))  # fmt: skip


if __name__ == "__main__":
    main()
