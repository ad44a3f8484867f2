"""Run stages on several ranks: all of them in one group of processes, whose libraries are imported already.

Micro-batches are made small, so that a tiny model has more of them than ranks. A fine-tuning is stopped and resumed.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from compresskit import distributed
from compresskit.api import compensate, prune, quantize, recover
from compresskit.recovery.training import finetune, trainer
from compresskit.walk import cost

COMMON = {"samples": 9, "sequence_length": 16}
MICRO_BATCH_BYTES = 2 * 16 * 256 * 4
MICRO_BATCH_TOKENS = 100
STOPPED_AFTER = 2
FINE_TUNING = {"sequence_length": 256, "batch_size": 8, "held_back": 0.2, "checkpoint_steps": 1, "learning_rate": 0.02}
LIBRARIES = [
    "tests.rank_runs",
    "transformers.models.llama.modeling_llama",
    "transformers.models.qwen3_moe.modeling_qwen3_moe",
    "scipy.sparse.linalg",
    "accelerate",
]


class Stopped(Exception):
    """Ends a fine-tuning."""


def recover_in_two(source: Path, out: Path, method: str, **given: Any) -> None:
    """Recover, stopped after a few steps and resumed."""

    def stop(watch: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == STOPPED_AFTER:
            raise Stopped

    with pytest.MonkeyPatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(trainer._Watch, "on_step_end", stop)
        recover(source, out, method, **given)
    recover(source, out, method, resume=True, **given)


RUNS = {
    "cfsp": (prune, "cfsp", {"sparsity": 0.4}),
    "depth": (prune, "depth", {"blocks": 2, "choose": "loss", "candidates": 1}),
    "depth-run": (prune, "depth", {"blocks": 1, "choose": "run", "refit": "gaps"}),
    "reap-experts": (prune, "reap", {"experts": 3}),
    "m-smoe-experts": (prune, "m-smoe", {"experts": 2}),
    "ream-experts": (prune, "ream", {"experts": 2, "refit": False}),
    "rtn": (quantize, "rtn", {"bits": 4, "group_size": 16}),
    "gptq": (quantize, "gptq", {"bits": 3, "group_size": 16}),
    "gptq-guided": (quantize, "gptq", {"bits": 3, "group_size": 16, "guide": "fisher", "guide_groups": 3}),
    "gptq-scaled": (quantize, "gptq", {"bits": 3, "group_size": 16, "scaling": "awq"}),
    "gptq-experts": (quantize, "gptq", {"bits": 4, "group_size": 16}),
    "gptq-mixed": (quantize, "gptq", {"bits": 2.5, "group_size": 16}),
    "gptq-int8": (quantize, "gptq", {"format": "int8", "activations": "dynamic", "smoothing": 0.5}),
    "rtn-fp8": (quantize, "rtn", {"format": "fp8", "activations": "static", "kv_cache": "fp8"}),
    "apiq": (quantize, "apiq", {"bits": 2, "group_size": 16, "epochs": 1, "batch": 3, "saliency": "fisher"}),
    "apiq-scaled": (quantize, "apiq", {"bits": 2, "samples": 5, "group_size": 16, "epochs": 1, "scaling": "awq"}),
    "apiq-experts": (quantize, "apiq", {"bits": 3, "samples": 5, "group_size": 16, "epochs": 1, "symmetric": True}),
    "recover": (recover, "paser", {**FINE_TUNING, "budget": 0.5, "neighbours": 5, "loss": "distill"}),
    "recover-full": (recover_in_two, "random", {**FINE_TUNING, "budget": 1.0, "update": "full"}),
    "recover-grid": (
        recover,
        "random",
        {**FINE_TUNING, "budget": 1.0, "steps": 3, "update": "grid", "train": "all", "learning_rate": 0.002},
    ),
    "eora": (compensate, "eora", {"rank": 4}),
    "eora-budget": (compensate, "eora", {"rank_budget": 4, "aim": "block"}),
    "act": (compensate, "act", {"rank": 4}),
    "svd": (compensate, "svd", {"rank": 4, "aim": "weight"}),
}
"""By name: the stage, the method and its settings."""


def run_all(work: Path, out: Path) -> None:
    """Run every stage on the models in `work`; the results lie in `out` under the names of `RUNS`."""
    cost.MICRO_BATCH_BYTES, finetune.MICRO_BATCH_TOKENS = MICRO_BATCH_BYTES, MICRO_BATCH_TOKENS
    for name, (stage, method, settings) in RUNS.items():
        given = {**COMMON, **settings, "calibration": str(work / "text.txt")}
        source = work / ("experts" if "experts" in name else "model")
        if stage is compensate:
            given["original"], source = str(source), out / "gptq"
        if stage in (recover, recover_in_two):
            given |= {"original": str(source), "data": (str(work / "data.jsonl"),)}
            if stage is recover:  # the pruned one's rows are of whole vectors: see dealt_weights.py
                source = out / ("gptq" if "grid" in name else "cfsp")
        stage(source, out / name, method, quiet=True, **given)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every weight file of the results."""
    files = sorted(out.rglob("*.safetensors"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_ranks(processes: int, port: int, work: Path, out: Path) -> None:
    """Run every stage in this many processes; what they print is in a file each beside `out`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    given = [
        {"RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        for rank in range(processes)
    ]
    started = [context.Process(target=_run_rank, args=(each, work, out)) for each in given]
    with pytest.MonkeyPatch.context() as patched:  # the server of forks may run already, for tests that preload other modules
        patched.syspath_prepend(str(Path(__file__).parents[1]))
        for process in started:
            process.start()
    for process in started:
        process.join()
    said = "".join(log.read_text()[-2000:] for log in sorted(out.parent.glob(f"{out.name}-*.log")))
    assert [process.exitcode for process in started] == [0] * processes, said


def _run_rank(environment: dict[str, str], work: Path, out: Path) -> None:
    import torch

    os.environ |= environment
    torch.set_num_threads(1)
    with out.with_name(f"{out.name}-{environment['RANK']}.log").open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    with distributed.joined():
        run_all(work, out)
