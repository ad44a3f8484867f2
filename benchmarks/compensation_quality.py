"""KL and perplexity of compressed SmolLM2 after compensation, over methods, ranks, budgets and factor sizes.

    python benchmarks/compensation_quality.py --data FOLDER --scratch FOLDER --results FILE.jsonl [--rows NAME ...]

FOLDER of the data holds wikitext2-validation.parquet (calibration) and wikitext2-test.parquet. The compressed models are
made once, in the scratch folder; repaired ones are deleted once measured. Finished rows are skipped, so that the run can be
stopped and continued. "for task" rows: calibrated on the first 5,000 questions and answers of instructions-gsm8k.jsonl, or on
wikitext; both are then scored on the rest of that file, "task_perplexity" and "task_kl".
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from compresskit.checkpoint.reader import open_checkpoint
from compresskit.checkpoint.source import DEMO, resolve
from compresskit.compensation.method import CompensateMethod
from compresskit.compensation.request import CompensateOptions
from compresskit.compensation.run import compensate
from compresskit.evaluation.request import EvaluateOptions
from compresskit.evaluation.run import evaluate
from compresskit.methods import method_class
from compresskit.models.load import open_model
from compresskit.pruning.run import prune
from compresskit.quantization.run import quantize
from compresskit.stages import Options

BUDGET = "budget of rank"
TASK = "instructions-gsm8k.jsonl"
TASK_SAMPLES = 5000
SOURCES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rtn 3": ("quantize", "rtn", {"bits": 3}),
    "rtn 2": ("quantize", "rtn", {"bits": 2}),
    "gptq 3": ("quantize", "gptq", {"bits": 3}),
    "gptq 2": ("quantize", "gptq", {"bits": 2}),
    "gptq 4": ("quantize", "gptq", {"bits": 4}),
    "apiq 2": ("quantize", "apiq", {"bits": 2, "rank": 0}),
    "apiq 3": ("quantize", "apiq", {"bits": 3, "rank": 0}),
    "apiq 4": ("quantize", "apiq", {"bits": 4, "rank": 0}),
    "cfsp 0.3": ("prune", "cfsp", {"sparsity": 0.3}),
    "2:4": ("zeros", "magnitude", {}),
}
ROWS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    **{f"{source}": (source, None, {}) for source in SOURCES},
    **{
        f"{source}, {method} {rank}": (source, method, {"rank": rank})
        for source in ("rtn 3", "gptq 3", "rtn 2", "gptq 2")
        for method in ("eora", "act", "svd")
        for rank in (8, 16, 32, 64, 128)
    },
    **{f"{source}, eora 8 in 8 bits": (source, "eora", {"rank": 8, "adapter_bits": 8}) for source in ("gptq 3", "gptq 2")},
    **{
        f"{source}, eora budget of rank {rank}": (source, "eora", {BUDGET: rank})
        for source in ("gptq 3", "gptq 2", "rtn 3", "rtn 2", "cfsp 0.3")
        for rank in (8, 32)
    },
    "gptq 3, eora budget of rank 8 in 8 bits": ("gptq 3", "eora", {BUDGET: 8, "adapter_bits": 8}),
    **{
        f"{source}, eora budget of rank 8 in 8 bits for {aim}": (source, "eora", {BUDGET: 8, "adapter_bits": 8, "aim": aim})
        for source in ("apiq 2", "apiq 3")
        for aim in ("weight", "block", "output")
    },
    "gptq 3, eora 8 for outputs": ("gptq 3", "eora", {"rank": 8, "aim": "output"}),
    "gptq 2, eora 8 for outputs": ("gptq 2", "eora", {"rank": 8, "aim": "output"}),
    "cfsp 0.3, eora 32": ("cfsp 0.3", "eora", {"rank": 32}),
    **{f"2:4, {method} 16": ("2:4", method, {"rank": 16}) for method in ("eora", "act", "svd")},
    **{
        f"{source}, eora 16 for task, calibrated on {text}": (source, "eora", {"rank": 16})
        for source in ("2:4", "gptq 3")
        for text in ("wikitext", "task")
    },
}


def zeros(out: Path) -> None:
    """The demo model with the two smallest of every four neighbouring weights of a row set to zero."""
    folder = resolve(DEMO)
    model = open_model(folder)
    out.mkdir(parents=True)
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and file.name != "compresskit.json":
            (out / file.name).write_bytes(file.read_bytes())
    for file in open_checkpoint(folder).files:
        tensors = load_file(file)
        for name in model.linears:
            weight = tensors[f"{model.stored_name(name)}.weight"]
            groups = weight.view(-1, 4)
            groups.scatter_(1, groups.abs().topk(2, dim=1, largest=False).indices, 0.0)
        save_file(tensors, out / file.name, metadata={"format": "pt"})


def made(name: str, scratch: Path, options: Options) -> Path:
    stage, method, settings = SOURCES[name]
    out = scratch / name.replace(" ", "-").replace(":", "-")
    if out.exists():
        return out
    if stage == "zeros":
        zeros(out)
    elif stage == "prune":
        prune(method_class("prune", method)(**settings), DEMO, out, options)
    else:
        quantize(method_class("quantize", method)(**settings), DEMO, out, options)
    return out


def share_of(rank: int, folder: Path) -> float:
    """Parameters of this rank everywhere over those of the model's linears."""
    model = open_model(folder)
    shapes = [model.linear_shape(name) for name in model.linears]
    return sum(rank * (rows + columns) for rows, columns in shapes) / sum(rows * columns for rows, columns in shapes)


def task_texts(data: Path, scratch: Path) -> tuple[Path, Path]:
    """The task's samples as plain text: to calibrate on, and to score."""
    texts = scratch / "task-calibration.txt", scratch / "task-scored.txt"
    rows = [json.loads(line) for line in (data / TASK).read_text().splitlines()]
    for path, part in zip(texts, (rows[:TASK_SAMPLES], rows[TASK_SAMPLES:]), strict=True):
        path.write_text("\n\n".join("\n".join(str(value) for value in row.values()) for row in part))
    return texts


def chosen(row: str, folder: Path) -> CompensateMethod | None:
    """The row's method with all its settings, None for the source alone."""
    _, method, settings = ROWS[row]
    if method is None:
        return None
    given = {key: value for key, value in settings.items() if key != BUDGET}
    if BUDGET in settings:
        given["rank_budget"] = share_of(settings[BUDGET], folder)
    found: CompensateMethod = method_class("compensate", method)(**given)
    return found


def run(row: str, method: CompensateMethod | None, folder: Path, data: Path, scratch: Path, samples: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    task = task_texts(data, scratch) if "for task" in row else None
    if method is not None:
        out = scratch / row.replace(" ", "-").replace(":", "-").replace(",", "")
        text = task[0] if task and row.endswith("on task") else data / "wikitext2-validation.parquet"
        options = CompensateOptions(calibration=str(text), samples=samples, original=DEMO, overwrite=True)
        result = compensate(method, str(folder), out, options)
        found = {key: result[key] for key in ("rank_total", "seconds", "time_shares", "bytes_after")}
        folder = out
    report = evaluate(str(folder), EvaluateOptions(against=DEMO, data=str(data / "wikitext2-test.parquet")))
    found |= {key: report[key] for key in ("bytes", "perplexity", "kl", "top1_agreement")}
    if task:
        report = evaluate(str(folder), EvaluateOptions(against=DEMO, data=str(task[1])))
        found |= {"task_perplexity": report["perplexity"], "task_kl": report["kl"]}
    if method is not None:
        shutil.rmtree(folder)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | MB | perplexity | KL | top-1 |", "|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row['perplexity']:.2f} | {row['kl']:.4f} | {row['top1_agreement']:.3f}"
        lines.append(f"| {row['row']} | {row['bytes'] / 1e6:.1f} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="; ".join(ROWS))
    parser.add_argument("--samples", type=int, default=64)
    arguments = parser.parse_args()
    done = [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    for name in arguments.rows:
        text = str(arguments.data / "wikitext2-validation.parquet")
        folder = made(ROWS[name][0], arguments.scratch, Options(calibration=text, samples=64))
        method = chosen(name, folder)
        row = {"row": name, "samples": arguments.samples, "settings": method.model_dump(mode="json") if method else None}
        if any(all(other.get(key) == value for key, value in row.items()) for other in done):
            continue
        done.append(row | run(name, method, folder, arguments.data, arguments.scratch, arguments.samples))
        with arguments.results.open("a") as file:
            file.write(json.dumps(done[-1]) + "\n")
    print(table(done))


if __name__ == "__main__":
    main()
