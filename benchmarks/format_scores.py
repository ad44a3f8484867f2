"""KL of quantised folders to the dense model in stock transformers: weights alone, and with activations rounded too.

    python benchmarks/format_scores.py DENSE FOLDER... --text FILE.parquet [--windows 8] [--length 512] [--dtype float32]

Weights alone: the folder as transformers dequantises it. Activations too: the emulation of compressed-tensors, which runs
where the folder is loaded without `dequantize`. Prints one JSON line a folder; KL is in nats a token.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def network(folder: str, dequantize: bool, dtype: torch.dtype) -> Any:
    """A folder in stock transformers; without `dequantize` the library emulates the activations."""
    config = AutoConfig.from_pretrained(folder)
    config.quantization_config = {**config.quantization_config, "dequantize": dequantize}
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()


@torch.no_grad()
def log_probabilities(model: Any, windows: torch.Tensor) -> list[torch.Tensor]:
    """(length, vocabulary) of each window, in 32 bits."""
    return [model(window[None]).logits[0].float().log_softmax(dim=-1) for window in windows]


def divergence(found: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float]:
    """Mean KL and share of the positions with the same most likely token."""
    kl = [
        torch.nn.functional.kl_div(a, b, log_target=True, reduction="sum") / len(a) for a, b in zip(found, reference, strict=True)
    ]
    same = [(a.argmax(dim=-1) == b.argmax(dim=-1)).float().mean() for a, b in zip(found, reference, strict=True)]
    return {"kl": round(float(torch.stack(kl).mean()), 5), "top1": round(float(torch.stack(same).mean()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    ids = AutoTokenizer.from_pretrained(arguments.dense)(
        "\n\n".join(parquet.read_table(arguments.text)["text"].to_pylist()), return_tensors="pt"
    ).input_ids[0]
    whole = ids[: len(ids) // arguments.length * arguments.length].view(-1, arguments.length)
    windows = whole[torch.linspace(0, len(whole) - 1, arguments.windows).long()]
    reference = log_probabilities(AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32).eval(), windows)
    for folder in arguments.folders:
        row: dict[str, Any] = {"folder": folder}
        activations = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        for what, dequantize in (("weights", True), ("activations", False)):
            if dequantize or activations.get("input_activations"):
                model = network(folder, dequantize, getattr(torch, arguments.dtype))
                row[what] = divergence(log_probabilities(model, windows), reference)
                del model
                gc.collect()
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
