"""Mutate a packed folder many times and expand it: each must give the original or a clean error, fast and in little memory.

    PYTHONPATH=tests python benchmarks/archive_fuzz.py [--files 100000] [--seed 0]

Prints a JSON line: how many files gave the original and how many an error, the slowest reading in CPU seconds, the memory that
reading added. Anything else than CheckpointError, or another content than the original's, ends the run with a traceback.
"""

from __future__ import annotations

from pathlib import Path

from archive_files import KINDS, content, mutated, read, small_folder, write
from damaged_copies import run


def made(folder: Path) -> tuple[bytes, object]:
    wanted = content(small_folder(folder / "source"))
    write(folder / "source", folder / "original")
    return (folder / "original").read_bytes(), wanted


def read_beside(path: Path) -> object:
    return read(path, path.with_name("out"))


if __name__ == "__main__":
    run(__doc__, made, KINDS, mutated, read_beside)
