"""Processor time of commands on a tiny model, user and system, of the whole process: median of several runs.

PYTHONPATH=tests python benchmarks/startup.py [--runs 5]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tiny_models import make_model

COMMANDS = {
    "--help": 0.5,
    "methods": 0.5,
    "inspect MODEL": 0.5,
    "quantize rtn MODEL OUT --overwrite": 4.0,
    "quantize nf4 MODEL OUT --overwrite": 5.0,
}
"""Commands, and the most seconds each may take."""
SHAPE = {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 192, "max_position_embeddings": 512}


def processor_seconds(command: list[str], folder: Path) -> float:
    """User and system time of a command and of all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as scratch:
        model, out = make_model(Path(scratch) / "model", "llama", **SHAPE), Path(scratch) / "out"
        for command, most in COMMANDS.items():
            words = command.replace("MODEL", str(model)).replace("OUT", str(out)).split()
            found = [processor_seconds([sys.executable, "-m", "compresskit", *words], Path(scratch)) for _ in range(runs)]
            row = {"command": command, "median": round(statistics.median(found), 2), "least": round(min(found), 2), "most": most}
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
