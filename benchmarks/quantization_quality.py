"""Stored bits, perplexity, KL and top-1 agreement of quantised SmolLM2, on text of the calibration's kind and another.

    python benchmarks/quantization_quality.py --data FOLDER --results FILE.jsonl [--rows NAME ...] [--samples 64]
        [--seeds 0 1 2] [--sequence-length 512] [--epochs 6] [--windows 20]

FOLDER holds wikitext2-validation.parquet (calibration), wikitext2-test.parquet and tasks/lambada.jsonl. Finished rows of
FILE are skipped, so that the run can be stopped and continued; the results are printed as Markdown. A seed decides which
windows are drawn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

from compresskit.checkpoint.source import DEMO
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.methods import method_class
from compresskit.quantization.run import quantize
from compresskit.stages import Options

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"rtn {bits}": ("rtn", {"bits": bits}) for bits in (2, 3, 4)},
    **{f"gptq {bits}": ("gptq", {"bits": bits}) for bits in (2, 3, 4)},
    **{f"gptq {bits}, guided": ("gptq", {"bits": bits, "guide": "fisher"}) for bits in (2, 3, 4)},
    **{f"gptq {bits}, guided, 4 groups": ("gptq", {"bits": bits, "guide": "fisher", "guide_groups": 4}) for bits in (2, 3)},
    **{f"{name} {bits}, scaled": (name, {"bits": bits, "scaling": "awq"}) for name in ("rtn", "gptq") for bits in (2, 3)},
    "gptq 2.5": ("gptq", {"bits": 2.5}),
    "gptq 2 symmetric": ("gptq", {"bits": 2, "symmetric": True}),
    "gptq 3 symmetric": ("gptq", {"bits": 3, "symmetric": True}),
    "nf4": ("nf4", {}),
    **{f"apiq {bits} rank 0": ("apiq", {"bits": bits, "rank": 0}) for bits in (2, 3)},
    "apiq 2 rank 8": ("apiq", {"bits": 2, "rank": 8}),
    "apiq 2 rank 8 in 8 bits": ("apiq", {"bits": 2, "rank": 8, "adapter_bits": 8}),
    "apiq 4 rank 0": ("apiq", {"bits": 4, "rank": 0}),
    "apiq 2 rank 0, rtn start": ("apiq", {"bits": 2, "rank": 0, "start": "rtn"}),
    "apiq 2 rank 0, nearest": ("apiq", {"bits": 2, "rank": 0, "rounding": "nearest"}),
    "apiq 2 rank 0, activation": ("apiq", {"bits": 2, "rank": 0, "saliency": "activation"}),
    "apiq 2 rank 0, fisher": ("apiq", {"bits": 2, "rank": 0, "saliency": "fisher"}),
}
SETTINGS = {"sequence_length": 512, "epochs": 0, "windows": 20}
"""Of rows that do not name them; 0 epochs are apiq's default."""
TEXTS = {"wikitext": ("wikitext2-test.parquet", 20), "lambada": ("tasks/lambada.jsonl", 10)}


def run(method: str, settings: dict[str, Any], arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    data: Path = arguments.data
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        text = "self" if arguments.calibration == "self" else str(data / arguments.calibration)
        length = arguments.sequence_length
        options = Options(calibration=text, samples=arguments.samples, sequence_length=length, seed=seed)
        result = quantize(method_class("quantize", method)(**settings), DEMO, out, options)
        found = {"stored_bits": result["bits_per_weight"], "seconds": round(result["seconds"])}
        for name, (file, most) in TEXTS.items():
            windows = min(most, arguments.windows)
            report = evaluate(str(out), EvaluateOptions(against=DEMO, data=str(data / file), windows=windows))
            found |= {f"{name}_{key}": report[key] for key in ("perplexity", "kl", "top1_agreement")}
        return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| | stored bits | wikitext2-test: perplexity | KL | top-1 | LAMBADA: perplexity | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        figures = [row[f"wikitext_{key}"] for key in ("perplexity", "kl", "top1_agreement")]
        other = [row[f"lambada_{key}"] for key in ("perplexity", "kl")]
        cells = " | ".join(f"{value:.3f}" for value in (row["stored_bits"], *figures, *other))
        lines.append(f"| {row['row']}, {row['calibration']} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="; ".join(ROWS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--calibration", default="wikitext2-validation.parquet", help="a file of FOLDER, or self")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sequence-length", type=int)
    parser.add_argument("--epochs", type=int, help="of apiq's training; 0, its default")
    parser.add_argument("--windows", type=int, help="the most that are scored of a text")
    parser.set_defaults(**SETTINGS)
    arguments = parser.parse_args()
    done = [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    asked = {key: getattr(arguments, key) for key in ("calibration", "samples", *SETTINGS)}
    for seed, name in itertools.product(arguments.seeds, arguments.rows):
        key = {"row": name, "seed": seed} | asked
        if any(key.items() <= ({"seed": 0} | SETTINGS | row).items() for row in done):
            continue
        method, settings = ROWS[name]
        epochs = {"epochs": arguments.epochs} if arguments.epochs else {}
        done.append(key | run(method, settings | epochs, arguments, seed))
        with arguments.results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    print(table(done))


if __name__ == "__main__":
    main()
