"""Perplexity of pruned SmolLM2 for every method, with and without refit, on text of the calibration's kind and another.

    python benchmarks/pruning_quality.py --data FOLDER --results FILE.jsonl [--grid acceptance|methods|texts|depth]
                                         [--samples 64] [--sequence-length 512] [--windows 20 10]

FOLDER holds wikitext2-validation.parquet, wikitext2-test.parquet and tasks/lambada.jsonl. Finished rows of FILE are
skipped, so that the run can be stopped and continued. `--table` prints FILE as Markdown.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from compresskit.calibration import encode
from compresskit.checkpoint.source import DEMO, resolve
from compresskit.evaluation.language_modelling import cut_windows, score
from compresskit.evaluation.request import read_evaluation_text
from compresskit.machine.device import Where
from compresskit.methods import method_class, runner
from compresskit.models.load import open_model
from compresskit.stages import Options

SPARSITIES = (0.3, 0.5, 0.2)
TEXTS = {"wikitext": "wikitext2-test.parquet", "lambada": "tasks/lambada.jsonl"}
WINDOW = 1024
WIKITEXT = "wikitext2-validation.parquet"


def jobs(grid: str, wikitext: str, sparsities: Sequence[float]) -> Iterator[dict[str, Any]]:
    """Method, its settings and the calibration text of every row."""
    if grid == "acceptance":
        yield {"method": "cfsp", "sparsity": 0.3, "calibration": "self"}
        for sparsity in (0.3, 0.5, 0.2):
            yield {"method": "cfsp", "sparsity": sparsity, "calibration": wikitext}
            yield {"method": "cfsp", "sparsity": sparsity, "calibration": wikitext, "allocation": "uniform"}
        for refit in (True, False):  # where another method comes closest
            yield {"method": "flap", "sparsity": 0.2, "calibration": wikitext, "refit": refit}
        yield {"method": "cfsp", "sparsity": 0.3, "calibration": f"self+{wikitext}"}
    elif grid == "texts":
        for text in ("builtin", "self", f"self+{wikitext}", wikitext):
            yield {"method": "cfsp", "sparsity": 0.3, "calibration": text}
    elif grid == "depth":  # 7 of 30 blocks take a little less room than cfsp at 0.3
        yield {"method": "cfsp", "sparsity": 0.3, "calibration": wikitext}
        for choose, refit in itertools.product(("loss", "run", "angle"), ("all", "gaps", "none")):
            yield {"method": "depth", "blocks": 7, "choose": choose, "refit": refit, "calibration": wikitext}
    else:
        for sparsity in sparsities:
            for refit in (True, False):
                for method in ("cfsp", "flap", "wanda-sp", "magnitude", "random"):
                    yield {"method": method, "sparsity": sparsity, "calibration": wikitext, "refit": refit}
            yield {"method": "cfsp", "sparsity": sparsity, "calibration": wikitext, "score": "released"}


@functools.cache
def demo() -> Path:
    """The dense model, verified once."""
    return resolve(DEMO)


def perplexities(folder: Path, data: Path, windows: list[int]) -> dict[str, float]:
    """Perplexity on the first windows of each text, by the definitions of the evaluate stage."""
    model = open_model(folder)
    found = {}
    for (name, file), count in zip(TEXTS.items(), windows, strict=True):
        text, _ = read_evaluation_text(str(data / file))
        ids = torch.tensor(encode(folder, text, True))
        found[name] = score(model, cut_windows(ids, WINDOW, count), Where(torch.device("cpu"), torch.float32)).perplexity
    return found


def run(job: dict[str, Any], data: Path, samples: int, length: int, windows: list[int]) -> dict[str, Any]:
    settings = {key: value for key, value in job.items() if key not in ("method", "calibration")}
    method = method_class("prune", job["method"])(**settings)
    calibration = job["calibration"].replace(WIKITEXT, str(data / WIKITEXT))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        started = time.monotonic()
        options = Options(calibration=calibration, samples=samples, sequence_length=length)
        result = runner("prune", job["method"])(method, str(demo()), out, options)
        seconds = time.monotonic() - started
        achieved = result.get("sparsity_achieved", result.get("removed_blocks"))
        return {
            "achieved": achieved,
            "bytes": result["bytes_after"],
            "seconds": round(seconds, 1),
            **perplexities(out, data, windows),
        }


def table(rows: list[dict[str, Any]], dense: dict[str, float]) -> str:
    lines = ["| settings | samples | " + " | ".join(f"{name} (ratio)" for name in TEXTS) + " |", "|---|---|---|---|"]
    for row in rows:
        label = " ".join(f"{k}={Path(v).name if k == 'calibration' else v}" for k, v in row["job"].items())
        cells = " | ".join(f"{row[name]:.2f} ({row[name] / dense[name]:.3f})" for name in TEXTS)
        lines.append(f"| {label} | {row['samples']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--grid", choices=("acceptance", "methods", "texts", "depth"), default="acceptance")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512, help="of a calibration window")
    parser.add_argument("--windows", type=int, nargs=2, default=[20, 10], help="of wikitext2-test and of LAMBADA")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES, help="of the grid `methods`")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    todo = [{"method": "dense"}, *jobs(arguments.grid, WIKITEXT, arguments.sparsities)]
    for job in [] if arguments.table else todo:
        if any(row["job"] == job and row["samples"] in (arguments.samples, 0) for row in rows):
            continue
        is_dense = job["method"] == "dense"
        common = (arguments.samples, arguments.sequence_length, arguments.windows)
        found = perplexities(demo(), arguments.data, arguments.windows) if is_dense else run(job, arguments.data, *common)
        rows.append({"job": job, "samples": 0 if is_dense else arguments.samples, **found})
        with arguments.results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    dense = next(row for row in rows if row["job"]["method"] == "dense")
    print(table([row for row in rows if row is not dense], dense))


if __name__ == "__main__":
    main()
