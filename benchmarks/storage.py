"""Disturb commands and runs, and count what breaks: faults of the disk and signals, kills of a run, two processes on one OUT.

    python benchmarks/storage.py faults --count 5000 [--commands prune,run] [--seed 0] [--workers 2]
    python benchmarks/storage.py kills --count 1000
    python benchmarks/storage.py pairs --count 200
    python benchmarks/storage.py cost SOURCE [--samples 32]

The harness is tests/fault_harness.py. It takes a C compiler and Linux. Prints a table, or a JSON line, and exits with 1 if
an invariant is broken. `cost` prints which share of a stage's time goes into fsync and into waiting for SHA-256, on the disk
of the working directory.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fault_harness import COMMANDS, GOOD, SMALL, Nursery, Room, Scene, compiled_shim, faults, lasting, tree

from compresskit.recipe.state import LOCK

MEMORY_DISK = Path("/dev/shm")
LONGEST_REFUSAL_SECONDS = 1.0


@contextmanager
def rooms(count: int = 1) -> Iterator[list[Room]]:
    """Rooms for trials, each with a process that runs commands."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if MEMORY_DISK.is_dir() else None) as folder:
        shim = compiled_shim(Path(folder))
        if shim is None:
            sys.exit("storage.py: takes a C compiler on Linux")
        found = []
        for number in range(count):
            root = Path(folder) / str(number)
            root.mkdir()
            found.append(Room(root, Nursery(shim, Path(folder) / "cache")))
        found[0].prepare()
        try:
            yield found
        finally:
            for room in found:
                room.nursery.__exit__()


def disturbed(job: tuple[str, bool, int, int]) -> dict[str, Any]:
    """Faults in one command, over an older OUT or not."""
    name, overwrites, count, seed = job
    started = time.monotonic()
    with rooms() as (room,):
        scene = Scene(room, name, overwrites)
        broken = [each for fault in faults(scene, count, seed) for each in scene.trial(*fault)]
    return {
        "command": name + (" --overwrite" if overwrites else ""), "calls": scene.calls, "faults": count, "broken": broken,
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip


def run_faults(arguments: argparse.Namespace) -> int:
    """Faults in all commands, spread evenly."""
    names = arguments.commands.split(",") if arguments.commands else list(COMMANDS)
    share = -(-arguments.count // (2 * len(names)))
    jobs = [(name, overwrites, share, arguments.seed) for name in names for overwrites in (False, True)]
    broken = 0
    print(f"{'command':22} {'calls':>6} {'faults':>6} {'broken':>6} {'seconds':>7}")
    with ProcessPoolExecutor(arguments.workers) as pool:
        for row in pool.map(disturbed, jobs):
            print(f"{row['command']:22} {row['calls']:6} {row['faults']:6} {len(row['broken']):6} {row['seconds']:7}", flush=True)
            print("".join(f"  {each}\n" for each in row["broken"]), end="", flush=True)
            broken += len(row["broken"])
    print(f"{share * len(jobs)} faults, {broken} broken invariants")
    return int(broken > 0)


def run_kills(arguments: argparse.Namespace) -> int:
    """Kill a run of three steps again and again until it finishes; then the next one."""
    moments = random.Random(arguments.seed)
    kills, runs, wrong = 0, 0, list[str]()
    command = COMMANDS["run"]
    with rooms() as (room,):
        scene = Scene(room, "run", overwrites=False)
        weights = {name: digest for name, digest in scene.result.items() if name.endswith(".safetensors")}
        others = set(tree(room.root / "template"))
        while kills < arguments.count:
            room.fresh(room.root / "template")
            finished: set[str] = set()
            while True:
                fault = {"below": f"{room.trial}/", "call": moments.randrange(scene.calls), "kind": "signal before"}
                found = room.run(command.arguments, fault | {"number": int(signal.SIGKILL)})
                state = room.trial / "out" / "run.json"
                steps = json.loads(state.read_text())["steps"] if state.is_file() else {}
                done = {name for name, step in steps.items() if step["status"] == "done"}
                if finished - done:
                    wrong.append(f"finished steps begun again: {sorted(finished - done)}")
                if found["code"] != -signal.SIGKILL:
                    break
                kills, finished = kills + 1, done
                if kills % 100 == 0:
                    print(json.dumps({"kills": kills, "runs": runs, "wrong": wrong}), flush=True)
            runs += 1
            ran = set(json.loads(found["printed"].strip().splitlines()[-1])["ran"]) if found["code"] == 0 else None
            if ran is None:
                wrong.append(found["printed"])
                continue
            wrong += [f"finished steps repeated: {sorted(ran & finished)}"] if ran & finished else []
            got = lasting(tree(room.trial / "out"))
            wrong += ["other weights"] if {name: got.get(name) for name in weights} != weights else []
            left = set(tree(room.trial, (room.trial / "out",))) - others
            left |= {name for name in got if name.endswith((".partial", ".new", ".lock")) and name != LOCK}
            wrong += [f"left: {sorted(left)}"] if left else []
    print(json.dumps({"kills": kills, "runs": runs, "wrong": wrong}))
    return int(bool(wrong))


def run_pairs(arguments: argparse.Namespace) -> int:
    """Two processes on one OUT."""
    moments = random.Random(arguments.seed)
    wrong, refusals = list[str](), list[float]()
    flags = f"prune cfsp model out {SMALL} --samples 1000".split()
    with rooms(2) as (room, other), ThreadPoolExecutor(2) as pool:
        other.root = room.root
        for _ in range(arguments.count):
            room.fresh(room.root / "template")
            asked = room.arguments(flags)

            def begin(which: Room, pause: float, asked: list[str] = asked) -> tuple[int, float, str]:
                time.sleep(pause)
                log = room.root / f"log-{id(which)}"
                started = time.monotonic()
                code = which.nursery.run(asked, log)["code"]
                return code, time.monotonic() - started, log.read_text()

            pauses = [0.0, moments.uniform(0, 0.15)]
            moments.shuffle(pauses)
            found = sorted(pool.map(begin, (room, other), pauses))
            (worked, _, _), (refused, seconds, said) = found
            named = re.search(r"out: process \d+ on \S+ is at work in it", said)
            if worked not in GOOD or refused != 2 or not named or seconds > LONGEST_REFUSAL_SECONDS:
                wrong.append(str(found))
            refusals.append(seconds)
            if not (room.trial / "out" / "compresskit.json").is_file() or (room.trial / "out.partial").exists():
                wrong.append("OUT is not whole, or something is left beside it")
    print(json.dumps({"pairs": arguments.count, "longest_refusal_seconds": round(max(refusals), 2), "wrong": wrong}))
    return int(bool(wrong))


def run_cost(arguments: argparse.Namespace) -> int:
    """The share of fsync, and of waiting for hashes, in a pruning, and in a quantisation that reads its result."""
    from compresskit import prune, quantize

    common = {"calibration": "builtin", "samples": arguments.samples, "quiet": True}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        pruned, quantized = Path(folder) / "pruned", Path(folder) / "quantized"
        stages = {
            "prune cfsp": lambda: prune(arguments.source, pruned, "cfsp", sparsity=0.2, **common),
            "quantize rtn": lambda: quantize(pruned, quantized, "rtn", **common),
        }
        for name, stage in stages.items():
            profile = cProfile.Profile()
            started = time.monotonic()
            profile.runcall(stage)
            seconds = time.monotonic() - started
            found: dict[str, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
            of = {what: sum(row[3] for (file, _, each), row in found.items() if each == what and "compresskit" in file)
                  for what in ("sync", "hashes")}  # fmt: skip
            shares = {what: round(each / seconds, 4) for what, each in of.items()}
            print(json.dumps({"stage": name, "seconds": round(seconds, 1), "shares": shares}), flush=True)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["faults", "kills", "pairs", "cost"])
    parser.add_argument("source", nargs="?", default="demo:smollm2-135m")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--commands", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    sys.exit({"faults": run_faults, "kills": run_kills, "pairs": run_pairs, "cost": run_cost}[arguments.what](arguments))


if __name__ == "__main__":
    main()
