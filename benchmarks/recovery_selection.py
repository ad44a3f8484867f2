"""Selections compared at equal budgets and steps: held-back response loss, wikitext, LAMBADA, four tasks; a JSON line a run.

    python benchmarks/recovery_selection.py --data DATA --compressed PRUNED --work FOLDER --out results.jsonl

Runs that `results.jsonl` holds already are skipped, so that it can be stopped and started. `--ablation` switches each part
of paser off alone, or does it otherwise, instead of comparing methods. Fine-tuned checkpoints are deleted once measured.
`--pool 0` takes all of the 32,711 samples; `--pool N` the same N of them for every seed, which then differ in what is held back,
in the draws of a selection, and in the order of training. What runs share is computed once: the data that is read, a process;
what was lost on a sample, its vector, and its loss before, once and for all, under `WORK/known`.
`--steps` takes one number for all budgets or one for each; `full` is trained for each of them, under that budget's name.
All losses are taken in bfloat16 where the processor multiplies it faster.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from recovery_share import losses, texts
from torch import Tensor

from compresskit.checkpoint import source
from compresskit.evaluation.task_files import read_tasks
from compresskit.evaluation.tasks import score_tasks
from compresskit.machine.device import choose_device
from compresskit.machine.precision import matrix_products
from compresskit.methods import method_class
from compresskit.models.load import open_model
from compresskit.recovery import forward
from compresskit.recovery.data import reading
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.options import RecoverOptions
from compresskit.recovery.run import recover
from compresskit.recovery.selection import degradation, embeddings
from compresskit.walk.walk import Walk

METHODS = ("paser", "random", "kmeans", "dsir", "zip-fit", "full")
ABLATION: dict[str, dict[str, Any]] = {
    "whole": {},
    "no clusters": {"cluster_by": "none"},
    "k-means for the diffusion map": {"cluster_by": "kmeans"},
    "budget by size": {"share_by": "size"},
    "budget by mean": {"share_by": "degradation"},
    "most efficient": {"pick_by": "efficiency"},
    "most lost": {"pick_by": "lost"},
    "random within clusters": {"pick_by": "random"},
    "no consistency": {"consistency": False},
    "divergence": {"lost_by": "divergence"},
    "the paper's": {"lost_by": "divergence", "share_by": "degradation", "pick_by": "efficiency"},
}


TASKS = ("arc_easy", "hellaswag", "lambada", "piqa")


def remember(module: Any, name: str, key: Callable[..., str]) -> None:
    """Replace a function of a module by one that computes once for each key of its arguments."""
    original, known = getattr(module, name), {}

    def call(*arguments: Any) -> Any:
        found = key(*arguments)
        if found not in known:
            known[found] = original(*arguments)
        return copy.copy(known[found])

    setattr(module, name, call)


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


class Known:
    """What was found of single samples, kept in a file as soon as a few are done: seeds share most of their samples."""

    def __init__(self, file: Path, many: int = 100) -> None:
        self.file, self.many = file, many
        self.rows: dict[str, Any] = torch.load(file) if file.is_file() else {}

    def of(self, samples: Sequence[Sample], compute: Callable[[list[Sample]], Sequence[Any]]) -> list[Any]:
        """A row for each sample; `compute` is asked for those that are not known, a few of like length at a time."""
        keys = [self.key(sample) for sample in samples]
        missing = [i for i, key in enumerate(keys) if key not in self.rows]
        missing.sort(key=lambda i: -len(samples[i].tokens))
        for start in range(0, len(missing), self.many):
            part = [samples[i] for i in missing[start : start + self.many]]
            self.add(part, compute(part))
        return [self.rows[key] for key in keys]

    def add(self, samples: Sequence[Sample], rows: Iterable[Any]) -> None:
        """Keep a row for each of the samples."""
        self.rows |= zip(map(self.key, samples), rows, strict=True)
        torch.save(self.rows, self.file.with_suffix(".partial"))
        self.file.with_suffix(".partial").replace(self.file)

    @staticmethod
    def key(sample: Sample) -> str:
        return digest(tuple(sample.tokens), sample.response_start)


def remember_what_runs_share(dense: str, compressed: Path, work: Path) -> None:
    folder = work / "known"
    folder.mkdir(parents=True, exist_ok=True)
    weights = digest([open_model(source.resolve(each)).checkpoint.hashes for each in (dense, str(compressed))])
    texts_of = lambda samples: digest([sample.text if hasattr(sample, "text") else str(sample) for sample in samples])  # noqa: E731
    remember(reading, "drop_duplicates", texts_of)
    remember(reading, "encode_samples", lambda reading, _, length: digest(texts_of(reading.samples), length))
    lost, states, before = (Known(folder / f"{name}-{weights}.pt") for name in ("degradations", "states", "losses"))
    degradations, own_states, response_losses = degradation.degradations, embeddings.own_states, forward.response_losses

    def known_degradations(original: Walk, walk: Walk, samples: Sequence[Sample], progress: object, folder: object) -> Any:
        def measure(part: list[Sample]) -> list[tuple[float, float]]:
            *each, found = degradations(original, walk, part)
            states.add(part, found)  # the pass of both models made them
            return list(zip(*each, strict=True))

        divergences, losses = zip(*lost.of(samples, measure), strict=True)
        return list(divergences), list(losses), known_states(walk, samples)

    def known_states(walk: Walk, samples: Sequence[Sample], progress: object = None) -> Tensor:
        return torch.stack(states.of(samples, lambda part: [*own_states(walk, part)]))

    def known_losses(walk: Walk, samples: Sequence[Sample]) -> list[tuple[int, float]]:
        def measure(part: list[Sample]) -> list[float]:
            with matrix_products(walk.device, "auto"):
                return [loss for _, loss in sorted(response_losses(walk, part))]

        # A fine-tuned model is a new one each time, whatever its folder is called.
        return list(enumerate(before.of(samples, measure) if walk.model.checkpoint.folder == compressed else measure([*samples])))

    degradation.degradations = known_degradations
    embeddings.own_states = known_states
    forward.response_losses = known_losses


def fixed_pool(data: Path, count: int, folder: Path) -> list[Path]:
    """Files of about `count` samples drawn from those of DATA in proportion, the same for every seed; duplicates count too."""
    files = {path.name: path.read_text().splitlines(keepends=True) for path in sorted(data.glob("instructions-*.jsonl"))}
    total = sum(map(len, files.values()))
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        drawn = sorted(random.Random(0).sample(range(len(lines)), round(count * len(lines) / total)))
        (folder / name).write_text("".join(lines[i] for i in drawn))
    return [folder / name for name in files]


def task_scores(folder: Path, data: Path, limit: int | None) -> dict[str, float]:
    """Length-normalised accuracy of each task; plain where there is one answer."""
    model = open_model(folder)
    tasks = read_tasks(data / "tasks", list(TASKS), limit, 0, 0)
    found = score_tasks(model, tasks, choose_device("auto", "float32", model.checkpoint.dtypes), lambda done, total: None)
    return {name: scores.get("accuracy_normalised", scores["accuracy"]) for name, scores in found.items()}


def runs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run: its method, its settings, its seed."""
    found = []
    steps = arguments.steps * len(arguments.budgets) if len(arguments.steps) == 1 else arguments.steps
    for seed in arguments.seeds:
        for budget, count in zip(arguments.budgets, steps, strict=True):
            same = {"seed": seed, "budget": budget, "steps": count}
            if arguments.ablation is not None:
                names = arguments.ablation or ABLATION
                found += [{"name": name, "method": "paser", **same, **ABLATION[name]} for name in names]
            else:
                found += [{"name": name, "method": name, **same} for name in arguments.methods]
    return found


def one(run: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    settings = {key: value for key, value in run.items() if key not in ("name", "method", "seed", "steps")}
    if run["method"] == "full":
        del settings["budget"]
    method = method_class("recover", run["method"])(**settings)
    out = arguments.work / "out"
    options = RecoverOptions(
        original=arguments.dense, data=tuple(str(path) for path in arguments.files),
        seed=run["seed"], loss=arguments.loss, steps=run["steps"], batch_size=arguments.batch_size,
        sequence_length=arguments.sequence_length, self_samples=arguments.self_samples, overwrite=True,
        update=arguments.update, held_back=arguments.held_back, checkpoint_steps=10_000,
        calibration=arguments.calibration, samples=16,
    )  # fmt: skip
    started, processor = time.monotonic(), time.process_time()
    result = recover(method, arguments.compressed, out, options)
    took = {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time() - processor, 1)}
    found = texts(arguments.data, source.resolve(arguments.dense), SimpleNamespace(**{**vars(arguments), "responses": 0}))
    after: dict[str, Any] = losses(out, {name: samples for name, samples in found.items() if samples}, "auto")
    if arguments.tasks:
        after["tasks"] = task_scores(out, arguments.data, arguments.task_limit)
    shutil.rmtree(out)
    held = {f"held_back_{when}": result[f"held_back_{when}"]["loss"] for when in ("before", "after")}
    held |= {f"by_token_{when}": result[f"held_back_{when}"]["loss_by_token"] for when in ("before", "after")}
    held["by_file"] = result["held_back_after"]["by_file"]
    return run | {"selected": result["selected"], "tokens_learned": result["tokens_learned"], **held, **after, **took}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--compressed", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dense", default="demo:smollm2-135m")
    parser.add_argument(
        "--ablation",
        nargs="*",
        choices=ABLATION,
        help="paser with these parts off or done otherwise; without names, each in turn",
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--tasks", action="store_true", help="score the four tasks of DATA/tasks too")
    parser.add_argument("--task-limit", type=int, help="questions of each task; all without it")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--loss", choices=("response", "distill"), default="response")
    parser.add_argument("--steps", type=int, nargs="+", default=[400])
    parser.add_argument("--update", choices=("low-rank", "full"), default="low-rank")
    parser.add_argument("--held-back", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--self-samples", type=int, default=0)
    parser.add_argument("--pool", type=int, default=0)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--passages", type=int, default=500)
    parser.add_argument("--calibration", default="self")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    files = sorted(arguments.data.glob("instructions-*.jsonl"))
    arguments.files = fixed_pool(arguments.data, arguments.pool, arguments.work / "pool") if arguments.pool else files
    remember_what_runs_share(arguments.dense, Path(arguments.compressed), arguments.work)
    done = [json.loads(line) for line in arguments.out.read_text().splitlines()] if arguments.out.exists() else []
    for run in runs(arguments):
        if any(all(line.get(key) == value for key, value in run.items()) for line in done):
            continue
        with arguments.out.open("a") as file:
            file.write(json.dumps(one(run, arguments)) + "\n")


if __name__ == "__main__":
    main()
