"""Kill a recipe's run at random moments, go on each time, and compare its weights with an uninterrupted run's.

    python benchmarks/recipe_kills.py --recipe demo --scratch FOLDER [--kills 20] [--seed 0] [--set NAME=VALUE]
    python benchmarks/recipe_kills.py --recipe benchmarks/recipe_kills_recover.yaml --set data=FILE.jsonl --scratch FOLDER

A run lives for 5 seconds up to a share (`--longest`, a tenth) of the uninterrupted run's time before SIGKILL. Prints a JSON
line a kill, with the step that it hit and those that were done, and a last one: the steps that ran twice though they had
finished, the weight files that differ, and how many seconds all runs took beside the uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compresskit.checkpoint.reader import sha256

LEAST_SECONDS = 5.0


def steps_of(out: Path) -> dict[str, str]:
    """Step -> status."""
    state = out / "run.json"
    return {name: step["status"] for name, step in json.loads(state.read_text())["steps"].items()} if state.exists() else {}


def weights_of(out: Path) -> dict[str, str]:
    return {str(file.relative_to(out)): sha256(file) for file in sorted(out.rglob("*.safetensors"))}


def killed(command: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Run for so long; what the kill hit."""
    with subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
    found = steps_of(out)
    running = [name for name, status in found.items() if status == "running"]
    return {"killed_after": round(seconds, 1), "in": running, "done": [name for name in found if name not in running]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.1)
    parser.add_argument("--set", action="append", default=[], dest="values")
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "compresskit", "run", arguments.recipe, *(f"--set={value}" for value in arguments.values)]
    whole, out = arguments.scratch / "whole", arguments.scratch / "killed"
    started = time.monotonic()
    subprocess.run([*command, str(whole), "--quiet"], check=True, stdout=subprocess.DEVNULL)
    alone = time.monotonic() - started
    moments, finished, redone = random.Random(arguments.seed), set[str](), set[str]()
    started = time.monotonic()
    for _ in range(arguments.kills):
        before = {name for name, status in steps_of(out).items() if status == "done"}
        found = killed(command, out, moments.uniform(LEAST_SECONDS, arguments.longest * alone))
        redone |= before - set(found["done"])
        finished |= before
        print(json.dumps(found), flush=True)
    last = subprocess.run([*command, str(out), "--quiet", "--json"], check=True, capture_output=True, text=True)
    redone |= finished & set(json.loads(last.stdout)["ran"])
    expected, got = weights_of(whole), weights_of(out)
    differ = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
    seconds = {"alone": round(alone), "with_kills": round(time.monotonic() - started)}
    print(json.dumps({"kills": arguments.kills, "files": len(expected), "differ": differ, "redone": sorted(redone), **seconds}))


if __name__ == "__main__":
    main()
