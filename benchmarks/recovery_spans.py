"""Recover a low-bit model's grid as a whole and by some blocks at a time, on the same samples: KL, perplexity and memory.

python benchmarks/recovery_spans.py LOW --original DENSE --text VALIDATION --test TEST --data FILE... [--sizes 0 2 1 4]

Prints a JSON line for the start and for each size: the mean KL divergence from the original in nats and the perplexity, by stock
transformers on the first windows of the test text, the memory peak in MB, and the seconds of processor time.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.recovery.options import RecoverOptions
from compresskit.recovery.run import recover
from compresskit.recovery.selection.random import Random


def peak_megabytes() -> float:
    """Largest resident memory since the last reset, which this is."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e3


@torch.inference_mode()
def predictions(folder: str, windows: torch.Tensor) -> torch.Tensor:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch.stack([network(window[None]).logits[0].log_softmax(-1) for window in windows])


def scores(folder: str, windows: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    found = predictions(folder, windows)
    kl = (wanted.exp() * (wanted - found)).sum(-1).mean()
    loss = torch.nn.functional.nll_loss(found[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
    return {"kl": round(float(kl), 4), "perplexity": round(float(loss.exp()), 2)}


def arguments() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("low")
    for name in ("--original", "--text", "--test"):
        parser.add_argument(name, required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 2, 1, 4])
    parser.add_argument("--windows", type=int, default=8)
    for name, value in (("--pool", 640), ("--text-samples", 48), ("--length", 256), ("--batch", 8)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    tokens = AutoTokenizer.from_pretrained(given.original)("\n\n".join(pq.read_table(given.test)["text"].to_pylist())).input_ids
    windows = torch.tensor(tokens[: given.windows * given.length]).view(-1, given.length)
    wanted = predictions(given.original, windows)
    print(json.dumps({"size": "start", **scores(given.low, windows, wanted)}), flush=True)
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            options = RecoverOptions(
                original=given.original, data=tuple(given.data), pool=given.pool, held_back=0.25, update="grid",
                text_samples=given.text_samples, calibration=given.text, sequence_length=given.length, batch_size=given.batch,
                learning_rate=given.learning_rate, blocks_at_once=size, verify=False,
            )  # fmt: skip
            peak_megabytes()
            started = time.process_time()
            result = recover(Random(budget=0.5), given.low, out, options)
            figures = {"peak_mb": round(peak_megabytes()), "seconds": round(time.process_time() - started)}
            report = json.loads((out / "recover.json").read_text())
            kept = [span["kept"] == "trained" for span in report.get("spans", [])]
            figures |= {"kept": result["kept"], "spans_kept": f"{sum(kept)}/{len(kept)}", "judged": result["judged"]}
            known = {name: result[name] for name in ("steps", "tokens_learned")}
            print(json.dumps({"size": size, **scores(str(out), windows, wanted), **figures, **known}), flush=True)


if __name__ == "__main__":
    main()
