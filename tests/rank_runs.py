"""Run stages on several ranks: `python -m torch.distributed.run ... rank_runs.py WORK` does them all in one group of processes.

Micro-batches are made small, so that a tiny model has more of them than ranks. Fine-tunings are stopped and resumed.
"""

from __future__ import annotations

import hashlib
import sys
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
STOPPED_AFTER = 3
FINE_TUNING = {"sequence_length": 256, "batch_size": 8, "held_back": 0.2, "checkpoint_steps": 2, "loss": "distill"}


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
    "rtn": (quantize, "rtn", {"bits": 4, "group_size": 16}),
    "gptq": (quantize, "gptq", {"bits": 3, "group_size": 16}),
    "gptq-experts": (quantize, "gptq", {"bits": 4, "group_size": 16}),
    "gptq-mixed": (quantize, "gptq", {"bits": 2.5, "group_size": 16}),
    "gptq-int8": (quantize, "gptq", {"format": "int8", "activations": "dynamic", "smoothing": 0.5}),
    "rtn-fp8": (quantize, "rtn", {"format": "fp8", "activations": "static", "kv_cache": "fp8"}),
    "apiq": (quantize, "apiq", {"bits": 2, "group_size": 16, "epochs": 2, "batch": 3, "saliency": "fisher"}),
    "apiq-experts": (quantize, "apiq", {"bits": 3, "group_size": 16, "epochs": 1, "symmetric": True, "rank": 0}),
    "recover": (recover_in_two, "paser", {**FINE_TUNING, "budget": 1.0, "neighbours": 5, "learning_rate": 0.05}),
    "recover-full": (recover_in_two, "random", {**FINE_TUNING, "budget": 1.0, "update": "full"}),
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
        if stage is recover_in_two:
            given |= {"original": str(source), "data": (str(work / "data.jsonl"),)}
            source = out / "cfsp"
        stage(source, out / name, method, quiet=True, **given)


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of every weight file of the results."""
    files = sorted(out.rglob("*.safetensors"))
    return {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    with distributed.joined():
        run_all(Path(sys.argv[1]), Path(sys.argv[2]))
