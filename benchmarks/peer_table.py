"""One table beside other tools, each at its own recommended settings: quality at equal bytes, times, peak memory.

    python benchmarks/peer_table.py WORK --data FOLDER --score SCORE.py [--peer TOOL=VENV ...] [--rows NAME ...] [--blocks N]
        [--samples 64] [--windows 20]

VENV is an environment with the tool, torch, transformers and pyarrow, and nothing of compresskit; tools and versions are in
`TOOLS`. FOLDER holds wikitext2-validation.parquet, wikitext2-test.parquet and tasks/lambada.jsonl. SCORE.py scores a checkpoint
with stock tools (perplexity, KL, top-1) in the environment that made it. `--blocks` quantizes the first blocks alone, the others
stay dense: for settings that need hours. Every row is a process with one thread; its times and peak are the system's.
Finished rows of WORK/rows.jsonl are not run again. Prints the rows as Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from compresskit.checkpoint.source import DEMO, resolve

TOOLS = {"llm-compressor": "llmcompressor==0.14.0.1", "auto-round": "auto-round==0.16.1"}
KIB = 1024
APIQ, GPTQ = ("apiq", "--rank", "0"), ("gptq",)
ROUND_DEFAULT = ("auto-round", "--iterations", "200")
ROUND_BEST = ("auto-round", "--iterations", "1000", "--extension")
ROWS: dict[str, tuple[int, tuple[str, ...]]] = {
    **{f"gptq {bits}": (bits, GPTQ) for bits in (2, 3, 4)},
    **{f"llm-compressor gptq {bits}": (bits, ("llm-compressor",)) for bits in (2, 3, 4)},
    **{f"apiq {bits}": (bits, APIQ) for bits in (2, 3)},
    **{f"auto-round default {bits}": (bits, ROUND_DEFAULT) for bits in (2, 3)},
    **{f"auto-round best {bits}": (bits, ROUND_BEST) for bits in (2, 3)},
}
"""By name: bits, then the method of `quantize` with its flags, or the tool of peers.py with its."""


def measured(command: list[str]) -> dict[str, float]:
    """Run a command with one thread: seconds of processor and wall time, peak memory in GB, children included."""
    started = time.monotonic()
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 3):  # 3: a collapse, which is reported and written
        raise SystemExit(f"{' '.join(command)}: ended with {process.returncode}")
    return {
        "processor_seconds": round(used.ru_utime + used.ru_stime),
        "wall_seconds": round(time.monotonic() - started),
        "peak_gb": round(used.ru_maxrss * KIB / 1e9, 2),
    }


def blocks_of(model: Path) -> int:
    """Number of blocks of a checkpoint."""
    return int(json.loads((model / "config.json").read_text())["num_hidden_layers"])


def run(name: str, model: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the checkpoint of a row and score it."""
    bits, (kind, *flags) = ROWS[name]
    out, text = arguments.work / "out", arguments.data / "wikitext2-validation.parquet"
    shutil.rmtree(out, ignore_errors=True)
    python = sys.executable
    if kind in TOOLS:
        python = str(Path(dict(arguments.peer)[kind]) / "bin" / "python")
        peers = str(Path(__file__).with_name("peers.py"))
        made = [python, peers, kind, str(model), str(out), "--text", str(text), "--bits", str(bits), *flags]
        made += ["--samples", str(arguments.samples), *(["--blocks", str(arguments.blocks)] if arguments.blocks else [])]
    else:
        made = [python, "-m", "compresskit", "quantize", kind, str(model), str(out), "--bits", str(bits), "--asymmetric", *flags]
        made += ["--calibration", str(text), "--samples", str(arguments.samples), "--quiet"]
        for block in range(arguments.blocks, blocks_of(model)) if arguments.blocks else ():
            made += ["--ignore", f"layers.{block}."]
    found: dict[str, Any] = {"name": name, "bits": bits, "blocks": arguments.blocks, **measured(made)}
    for what, file in (("wikitext", "wikitext2-test.parquet"), ("lambada", "tasks/lambada.jsonl")):
        score = [python, str(arguments.score), str(out), "--reference", str(model), "--data", str(arguments.data / file)]
        scored = subprocess.run([*score, "--windows", str(arguments.windows)], check=True, capture_output=True, text=True)
        found[what] = json.loads(scored.stdout.strip().splitlines()[-1])
    return found


def printed(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = ["| | MB | perplexity | KL | top-1 | LAMBADA KL | processor, s | wall, s | peak, GB |", "|" + "---|" * 9]
    for row in rows:
        wiki, other = row["wikitext"], row["lambada"]
        figures = (
            f"{wiki['bytes'] / 1e6:.1f}", f"{wiki['perplexity']:.2f}", f"{wiki['kl']:.3f}", f"{wiki['top1_agreement']:.3f}",
            f"{other['kl']:.3f}", row["processor_seconds"], row["wall_seconds"], row["peak_gb"],
        )  # fmt: skip
        lines.append(f"| {row['name']} | " + " | ".join(map(str, figures)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--score", type=Path, required=True)
    parser.add_argument("--peer", action="append", default=[], type=lambda given: tuple(given.split("=", 1)))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--blocks", type=int, default=0)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=20)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = arguments.work / "rows.jsonl"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    model = resolve(DEMO)
    known = {(row["name"], row["blocks"]) for row in found}
    for name in arguments.rows or [
        name for name, (_, (kind, *_)) in ROWS.items() if kind not in TOOLS or kind in dict(arguments.peer)
    ]:
        if (name, arguments.blocks) not in known:
            found.append(run(name, model, arguments))
            results.open("a").write(json.dumps(found[-1]) + "\n")
    print(printed([row for row in found if row["blocks"] == arguments.blocks]))


if __name__ == "__main__":
    main()
