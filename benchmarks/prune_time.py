"""Time of `prune cfsp` over that of a plain transformers forward pass on the same tokens, in one process, in turn.

    python benchmarks/prune_time.py --text FILE [--samples 64] [--rounds 3] [--sparsity 0.3]

Prints a JSON line: the ratio of every round and the median, for cfsp (two passes) and uniform (one pass) allocation.
Imports, calibration tokenisation (in prune) and model loading (in the forward pass) are not hidden: the forward pass
starts with its model in memory, the prune run reads, hashes, computes and writes everything.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from compresskit.calibration import calibrate
from compresskit.calibration.sources import TextRequest
from compresskit.checkpoint.source import DEMO, resolve
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.pruning.cfsp import CFSP
from compresskit.pruning.run import prune
from compresskit.stages import Options

SEQUENCES_A_BATCH = 4


def forward_seconds(network: torch.nn.Module, tokens: torch.Tensor) -> float:
    started = time.perf_counter()
    with torch.no_grad():
        for batch in tokens.split(SEQUENCES_A_BATCH):
            network(batch, use_cache=False)
    return time.perf_counter() - started


def prune_seconds(allocation: str, sparsity: float, text: Path, samples: int) -> float:
    method = CFSP.model_validate({"allocation": allocation, "sparsity": sparsity})
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        prune(method, DEMO, Path(scratch) / "out", Options(calibration=str(text), samples=samples))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sparsity", type=float, default=0.3)
    arguments = parser.parse_args()
    model = open_model(resolve(DEMO))
    text = calibrate(TextRequest(str(arguments.text), arguments.samples, 512), model, Where(torch.device("cpu"), torch.float32))
    network = AutoModelForCausalLM.from_pretrained(resolve(DEMO), dtype=torch.float32).eval()
    forward_seconds(network, text.tokens[:SEQUENCES_A_BATCH])
    ratios: dict[str, list[float]] = {"cfsp": [], "uniform": []}
    for _ in range(arguments.rounds):
        for allocation, found in ratios.items():
            forward = forward_seconds(network, text.tokens)
            found.append(prune_seconds(allocation, arguments.sparsity, arguments.text, arguments.samples) / forward)
    print(
        json.dumps({k: {"ratios": [round(x, 3) for x in v], "median": round(statistics.median(v), 3)} for k, v in ratios.items()})
    )


if __name__ == "__main__":
    main()
