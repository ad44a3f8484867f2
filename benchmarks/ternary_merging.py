"""Normalised gain of merged adapters on the tasks of their sources, on the test samples of ternary_training.py.

    python benchmarks/ternary_merging.py --adapters FOLDER --results FILE.jsonl --tasks A B C --merged FOLDER...

FOLDER of --merged: what `compresskit merge` wrote. The gain of a task is (base - merged) / (base - its own adapter) in loss
of a response token; prints a JSON line a merged folder, with the mean over the tasks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from ternary_quality import Rows, factors_of, response_loss, sort_samples
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.source import DEMO, resolve


def test_loss(adapter: Path, task: str, folder: Path, base: bool = False) -> float:
    network = AutoModelForCausalLM.from_pretrained(resolve(DEMO), dtype=torch.float32)
    model = PeftModel.from_pretrained(network, adapter).eval()
    if base:
        with torch.no_grad():
            for factor in factors_of(model).values():
                factor.zero_()
    return response_loss(model, sort_samples(folder, task)["test"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--merged", type=Path, nargs="+", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows, folder = Rows(arguments.results), arguments.adapters
    for merged in arguments.merged:
        gains = {}
        for task in arguments.tasks:
            what = {"task": task, "half": "test"}
            base = rows.get({**what, "what": "base"}, lambda t=task: test_loss(folder / t, t, folder, base=True))
            own = rows.get({**what, "what": "adapter"}, lambda t=task: test_loss(folder / t, t, folder))
            found = rows.get({**what, "what": merged.name}, lambda t=task, m=merged: test_loss(m, t, folder))
            gains[task] = (base - found) / (base - own)
        print(json.dumps({"merged": merged.name, "gains": gains, "mean": sum(gains.values()) / len(gains)}), flush=True)


if __name__ == "__main__":
    main()
