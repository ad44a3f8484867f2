"""Speed of the ternary codec beside a memory copy and zstd -3 on the same bytes, in one run, in turn.

    python benchmarks/ternary_codec.py [--entries 40000000] [--rounds 3]

The vector is coded section by section, as the command does it, by one thread. zstd takes the same ternary vector as 16-bit
floats, single-threaded, through the binary `zstd` where it is installed (file reads and writes included). Prints a JSON
line a density: best of the rounds in CPU seconds, which other work on the machine disturbs less than the clock, as million
entries a CPU second and as ratios to the copy of the 16-bit vector; sizes in bits an entry.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from compresskit.formats.ternary.golomb import Signs, entropy
from compresskit.formats.ternary.sections import SECTION, Section, decode, encode


def cpu_seconds() -> float:
    """Of this process, and of its finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + used.ru_utime + used.ru_stime


def seconds(work: Callable[[], Any], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        started = cpu_seconds()
        work()
        times.append(cpu_seconds() - started)
    return min(times)


def encoded(parts: list[Signs]) -> list[tuple[Section, bytes]]:
    return [encode(part, b"", "auto", (0, 512 * place)) for place, part in enumerate(parts)]


def decoded(coded: list[tuple[Section, bytes]], parts: list[Signs]) -> list[tuple[Signs, bytes]]:
    pairs = enumerate(zip(coded, parts, strict=True))
    return [decode(body, section, len(part), (0, 512 * place), "x") for place, ((section, body), part) in pairs]


def zstd_figures(data: bytes, rounds: int) -> dict[str, float]:
    if shutil.which("zstd") is None:
        return {}
    with tempfile.TemporaryDirectory() as name:
        plain, packed = Path(name) / "plain", Path(name) / "packed"
        plain.write_bytes(data)
        write = seconds(lambda: subprocess.run(["zstd", "-3", "-q", "-f", "-T1", plain, "-o", packed], check=True), rounds)
        read = seconds(lambda: subprocess.run(["zstd", "-d", "-q", "-f", packed, "-o", plain], check=True), rounds)
        return {"encode": write, "decode": read, "bytes": packed.stat().st_size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=40_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    count = arguments.entries
    for density in (0.05, 0.1, 0.2, 0.3, 0.5):
        generator = np.random.default_rng(0)
        signs = (generator.random(count, np.float32) < density).astype(np.int8)
        signs *= 1 - 2 * generator.integers(0, 2, count, dtype=np.int8)
        parts = [signs[start : start + SECTION] for start in range(0, count, SECTION)]
        half = (0.01 * signs).astype(np.float16)
        copy = seconds(half.copy, arguments.rounds)
        coded = encoded(parts)
        assert all(np.array_equal(a[0], b) for a, b in zip(decoded(coded, parts), parts, strict=True))
        encoding = seconds(partial(encoded, parts), arguments.rounds)
        decoding = seconds(partial(decoded, coded, parts), arguments.rounds)
        bits = 8 * sum(len(body) for _, body in coded) / count
        zstd = zstd_figures(half.tobytes(), arguments.rounds)
        row = {"density": density, "bits": bits, "over_entropy": bits / entropy(density) - 1, "times_smaller": 16 / bits,
               "encode_million_a_cpu_second": count / encoding / 1e6, "decode_million_a_cpu_second": count / decoding / 1e6,
               "encode_over_copy": encoding / copy, "decode_over_copy": decoding / copy}  # fmt: skip
        if zstd:
            row |= {"zstd_encode_over_copy": zstd["encode"] / copy, "zstd_decode_over_copy": zstd["decode"] / copy,
                    "zstd_bits": 8 * zstd["bytes"] / count}  # fmt: skip
        print(json.dumps({key: round(value, 4) for key, value in row.items()}), flush=True)


if __name__ == "__main__":
    main()
