"""Damage the files of every reader many times and read them: each must be refused by name, or be read, fast and in little memory.

    PYTHONPATH=tests python benchmarks/fuzz.py [--mutations 1000000] [--processes 2] [--seed 0] [--readers NAME,NAME]

Prints a line for every reader, and every kind of violation with the seed that repeats it. Exit code 1 if there are any.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from fuzz_readers import READERS, Bench

BATCH = 2000
HANGS_SECONDS = 600
"""A batch takes seconds; one that takes this long hangs in code that no signal reaches, and its process ends with a trace."""
SHOWN = 20


@dataclass
class Tally:
    """What came of the damaged files of one reader."""

    counts: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    peak_kibibytes: int = 0
    violations: dict[str, int] = field(default_factory=dict)
    """Seed of the first of each kind."""

    def add(self, other: Tally) -> None:
        self.counts += other.counts
        self.slowest = max(self.slowest, other.slowest)
        self.peak_kibibytes = max(self.peak_kibibytes, other.peak_kibibytes)
        self.violations = other.violations | self.violations


BENCHES: dict[str, Bench] = {}
"""The readers that this process has made ready."""


def silence() -> None:
    """Panics of Rust libraries print a page each."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def run(job: tuple[str, int, int, str]) -> tuple[str, Tally]:
    """One batch: (reader, first seed, number of mutations, folder)."""
    import torch

    torch.set_num_threads(1)
    name, first, count, root = job
    faulthandler.dump_traceback_later(HANGS_SECONDS, exit=True, file=sys.stdout)
    if name not in BENCHES:
        BENCHES.clear()  # each holds a folder and its tensors
        BENCHES[name] = Bench(name, Path(tempfile.mkdtemp(dir=root)) / "files")
    tally = Tally()
    for seed in range(first, first + count):
        verdict = BENCHES[name].judged(BENCHES[name].mutation(seed))
        right = verdict.outcome in ("refused", "accepted")
        tally.counts[verdict.outcome if right else "uncaught"] += 1
        tally.slowest = max(tally.slowest, verdict.seconds)
        if not right:
            tally.violations.setdefault(verdict.outcome[:60], seed)
    tally.peak_kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faulthandler.cancel_dump_traceback_later()
    return name, tally


def jobs(names: list[str], mutations: int, seed: int, root: str) -> list[tuple[str, int, int, str]]:
    """The batches of all readers, each with its share of the mutations, reader by reader."""
    total = sum(READERS[name].share for name in names)
    found = []
    for name in names:
        count = max(1, round(mutations * READERS[name].share / total))
        found += [(name, seed + start, min(BATCH, count - start), root) for start in range(0, count, BATCH)]
    return found


def report(tallies: dict[str, Tally], seconds: float) -> bool:
    """Print the table; returns whether there are no violations."""
    print(f"{'reader':34}{'mutations':>10}{'refused':>10}{'accepted':>10}{'uncaught':>10}{'slowest s':>11}{'peak MiB':>10}")
    total: Counter[str] = Counter()
    for name, tally in tallies.items():
        total += tally.counts
        numbers = [tally.counts.total(), *(tally.counts[key] for key in ("refused", "accepted", "uncaught"))]
        line = "".join(f"{number:10,}" for number in numbers)
        print(f"{name:34}{line}{tally.slowest:11.3f}{tally.peak_kibibytes >> 10:10,}")
    print(f"{total.total():,} mutations in {seconds:.0f} seconds, {total['uncaught']} violations")
    for name, tally in tallies.items():
        for kind, seed in list(tally.violations.items())[:SHOWN]:
            print(f"{name}, seed {seed}: {kind}")
    return not total["uncaught"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=1_000_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--readers", default="", help="names, joined by commas; all if none is given")
    arguments = parser.parse_args()
    names = arguments.readers.split(",") if arguments.readers else list(READERS)
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    root = tempfile.mkdtemp(prefix="fuzz-", dir=memory)
    started = time.monotonic()
    tallies = {name: Tally() for name in names}
    try:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.processes, mp_context=spawn, initializer=silence) as pool:
            for name, tally in pool.map(run, jobs(names, arguments.mutations, arguments.seed, root)):
                tallies[name].add(tally)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    sys.exit(0 if report(tallies, time.monotonic() - started) else 1)


if __name__ == "__main__":
    main()
