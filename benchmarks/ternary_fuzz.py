"""Mutate a ternary file many times and read it: each must give the original or a clean error, fast and in little memory.

    PYTHONPATH=tests python benchmarks/ternary_fuzz.py [--files 100000] [--seed 0]

Prints a JSON line: how many files gave the original and how many an error, the slowest read in CPU seconds, the memory that
reading added. Anything else than CheckpointError, or another content than the original's, ends the run with a traceback.
"""

from __future__ import annotations

from pathlib import Path

from damaged_copies import run
from ternary_files import KINDS, mutated, read, small_file


def made(folder: Path) -> tuple[bytes, object]:
    return small_file(folder), read(folder / "original")


if __name__ == "__main__":
    run(__doc__, made, KINDS, mutated, read)
