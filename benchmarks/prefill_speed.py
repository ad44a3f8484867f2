"""Prefill speed-up of pruned models over what their FLOPs predict, side by side with the dense model in one run.

    python benchmarks/prefill_speed.py [--source FOLDER] [--rounds 9] [--sparsity 0.2 0.3 0.5]

Uniform layout; channels are chosen by magnitude without refit, since only the shapes matter here. FLOPs are counted by
torch's counter over one prefill of 512 tokens. Prints a JSON line a sparsity; a share above 0.85 is the aim.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from compresskit.checkpoint.source import DEMO, resolve
from compresskit.evaluation.speed import PROMPT_TOKENS, speed
from compresskit.machine.device import Where
from compresskit.models.load import open_model
from compresskit.models.ragged import load_stock
from compresskit.pruning.magnitude import Magnitude
from compresskit.pruning.run import prune
from compresskit.stages import Options

CPU = Where(torch.device("cpu"), torch.float32)


def prefill_flops(folder: Path) -> int:
    network = load_stock(open_model(folder), CPU)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64), use_cache=True, logits_to_keep=1)
    return int(counter.get_total_flops())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default=DEMO)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3, 0.5])
    arguments = parser.parse_args()
    source = resolve(arguments.source)
    dense_flops = prefill_flops(source)
    for sparsity in arguments.sparsity:
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "out"
            prune(Magnitude(sparsity=sparsity, refit=False), str(source), out, Options())
            predicted = dense_flops / prefill_flops(out)
            models = open_model(out), open_model(source)
            found = speed(models[0], CPU, models[1], arguments.rounds).prefill_speedup
            assert found is not None
            line = {"sparsity": sparsity, "predicted": round(predicted, 3), "measured": round(found, 3)}
            print(json.dumps(line | {"share": round(found / predicted, 3)}), flush=True)


if __name__ == "__main__":
    main()
