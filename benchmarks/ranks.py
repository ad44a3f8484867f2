"""Several ranks on one machine: time against one rank, and kill -9 of a rank at random moments.

    python benchmarks/ranks.py speed SOURCE --text FILE [--ranks 2] [--samples 16] [--length 512] [--rounds 1]
        [--stage "quantize gptq --bits 3" | "quantize apiq --bits 2 --rank 0 --epochs 1"
            | "recover random --budget 1 --original SOURCE --data FILE.jsonl"]
    python benchmarks/ranks.py kills SOURCE --text FILE [--ranks 2] [--kills 20] [--stage ...]

`speed` runs the command with one rank and with several in turn, one thread each, and prints a JSON line: the median of each,
their ratio, and whether all weight files agree. `kills` ends one rank with SIGKILL at a random moment of its run; then the
same command with --resume has to give the bytes of an undisturbed run. It prints the seconds from the kill to the end of all
processes, and the lines that were said.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK_MODULE = b"compresskit"


def started(arguments: argparse.Namespace, ranks: int, out: Path, *more: str) -> subprocess.Popen[str]:
    """Start the command under torchrun, one thread a rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", port]
    stage = arguments.stage.split()
    text = ["--calibration", arguments.text, "--samples", str(arguments.samples), "--sequence-length", str(arguments.length)]
    command = ["-m", "compresskit", *stage[:2], arguments.source, str(out), *stage[2:], *text, "--quiet", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*launch, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every weight file."""
    files = sorted(out.rglob("*.safetensors"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def ranks_of(launcher: int) -> list[int]:
    """Processes that a launcher has started and that have begun the command."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and RANK_MODULE in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (OSError, ValueError):  # it has just ended
            continue
    return sorted(found)


def speed(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Both numbers of ranks in turn."""
    seconds: dict[int, list[float]] = {1: [], arguments.ranks: []}
    found: dict[int, dict[str, str]] = {}
    for _ in range(arguments.rounds):
        for ranks, times in seconds.items():
            out = work / f"ranks-{ranks}"
            shutil.rmtree(out, ignore_errors=True)
            began = time.monotonic()
            said = started(arguments, ranks, out).communicate()
            times.append(time.monotonic() - began)
            found[ranks] = digests(out)
            if not found[ranks]:
                raise SystemExit(said[1])
    medians = {str(ranks): round(statistics.median(each), 1) for ranks, each in seconds.items()}
    ratio = medians["1"] / medians[str(arguments.ranks)]
    return {"seconds": medians, "speed_up": round(ratio, 2), "same_bytes": len({str(each) for each in found.values()}) == 1}


def kills(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One kill a round."""
    whole = work / "whole"
    began = time.monotonic()
    started(arguments, arguments.ranks, whole).communicate()
    usual, expected = time.monotonic() - began, digests(whole)
    chance = random.Random(0)
    rounds = []
    for number in range(arguments.kills):
        out = work / f"killed-{number}"
        run = started(arguments, arguments.ranks, out)
        time.sleep(chance.uniform(0.1, 1.0) * usual)
        victims = ranks_of(run.pid)
        killed = time.monotonic()
        if victims:
            os.kill(chance.choice(victims), signal.SIGKILL)
        printed = run.communicate()[1]
        said = [line for line in printed.splitlines() if line.startswith("compresskit: error")]
        if len(said) != 1:
            print(printed[-2000:], file=sys.stderr)
        ended = time.monotonic() - killed
        again = started(arguments, arguments.ranks, out, "--resume")
        errors = again.communicate()[1]
        agrees = digests(out) == expected
        rounds.append({"victims": len(victims), "seconds": round(ended, 1), "said": said, "same_bytes": agrees})
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
        if not agrees:
            print(errors[-2000:], file=sys.stderr)
        shutil.rmtree(out, ignore_errors=True)
    hit = [each for each in rounds if each["victims"]]
    return {
        "kills": len(hit),
        "same_bytes": sum(each["same_bytes"] for each in hit),
        "one_line": sum(len(each["said"]) == 1 for each in hit),
        "longest_seconds": max(each["seconds"] for each in hit),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "kills"])
    parser.add_argument("source")
    parser.add_argument("--text", required=True)
    parser.add_argument("--stage", default="quantize gptq --bits 3")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print(json.dumps((speed if arguments.what == "speed" else kills)(arguments, work)))


if __name__ == "__main__":
    main()
