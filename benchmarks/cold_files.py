"""Time of a pass over a model whose files are not cached, against the same with everything cached, in turn.

    python benchmarks/cold_files.py FOLDER [--windows 8] [--length 256] [--passes 1] [--rounds 3] [--threads 2] [--alone]

A pass is a walk over all blocks with random tokens, on the CPU. Before a cold pass the files are synced and the system is asked
to drop them from its cache (posix_fadvise); what is still cached afterwards is told as a share of the sampled pages. `--alone`
walks without fetching ahead, for comparison. Prints JSON: seconds of each pass, their medians, the ratio of the medians, and
the speed at which the disk alone reads the files.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.walk import ahead
from compresskit.walk.walk import Walk

CHUNK_BYTES = 1 << 22
SAMPLED_PAGES = 200


def drop(files: list[Path]) -> float:
    """Ask the system to drop the files; the share of sampled pages that it still holds."""
    held = []
    for path in files:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(file).st_size
        held += [_is_cached(file, number * size // SAMPLED_PAGES) for number in range(SAMPLED_PAGES)]
        os.close(file)
    return sum(held) / len(held)


def _is_cached(file: int, start: int) -> bool:
    try:
        return os.preadv(file, [bytearray(1)], start, os.RWF_NOWAIT) == 1
    except BlockingIOError:
        return False


def read(files: list[Path]) -> float:
    """Read the files to the end; seconds."""
    started, buffer = time.perf_counter(), bytearray(CHUNK_BYTES)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - started


def walked(folder: Path, tokens: torch.Tensor, passes: int) -> float:
    model = open_model(folder)
    started = time.perf_counter()
    for _ in range(passes):
        for _block in Walk(model, tokens, Where(torch.device("cpu"), torch.float32)):
            pass
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="fetch nothing ahead")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.alone:
        ahead.read_ahead = lambda *_: None
    model = open_model(arguments.folder)
    files = model.checkpoint.files
    tokens = torch.randint(3, model.vocabulary, (arguments.windows, arguments.length))
    seconds: dict[str, list[float]] = {"cold": [], "cached": []}
    still_cached, disk = [], []
    for _ in range(arguments.rounds):
        still_cached.append(drop(files))
        disk.append(read(files))
        seconds["cached"].append(walked(arguments.folder, tokens, arguments.passes))
        still_cached.append(drop(files))
        seconds["cold"].append(walked(arguments.folder, tokens, arguments.passes))
    medians = {what: statistics.median(each) for what, each in seconds.items()}
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    result = {
        "gigabytes": round(gigabytes, 2), "tokens": tokens.numel(), "passes": arguments.passes,
        "fetched_ahead": not arguments.alone, "still_cached": round(max(still_cached), 3),
        "disk_gigabytes_per_second": round(gigabytes / statistics.median(disk), 2),
        "seconds": {what: [round(each, 1) for each in found] for what, found in seconds.items()},
        "medians": {what: round(each, 2) for what, each in medians.items()},
        "ratio": round(medians["cold"] / medians["cached"], 3),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
