"""What ternary adapters keep of their fine-tuning gain, and what merging them keeps, on the adapters of ternary_training.py.

    python benchmarks/ternary_quality.py --adapters FOLDER --results FILE.jsonl [--densities 0.2] [--forms balanced]

For every adapter: the mean loss of a response token on its held-back samples, for the base, the adapter, and the ternary
adapter over densities and alphas (8 validation samples; a density ends at the first alpha that is worse than the one
before), then for the alpha that validation picks (16 test samples); with balanced factors, and as stored at density 0.2.
    gain kept = (loss of the base - loss of the ternary adapter) / (loss of the base - loss of the adapter)
A row is written as soon as it is measured; rows that the file has are not measured again. The cut and the scale are the
package's, the model is stock transformers with stock peft.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from ternary_training import ADAPTERS, Sample, padded
from torch.nn import functional
from transformers import AutoModelForCausalLM

from compresskit.checkpoint.source import DEMO, resolve
from compresskit.formats.ternary.threshold import Spread, Threshold
from compresskit.numerics.lowrank import balanced_factors

DENSITIES = (0.2, 0.05, 0.5, 0.1, 0.3)
VALIDATION = 8
ALPHAS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
BATCH = 8
Factors = dict[str, torch.Tensor]


def response_loss(model: PeftModel, samples: list[Sample]) -> float:
    """Nats a token; the head sees the positions of responses only."""
    total, count = 0.0, 0
    inner = model.get_base_model()
    with torch.no_grad():
        for start in range(0, len(samples), BATCH):
            ids, labels = padded(samples[start : start + BATCH])
            hidden = inner.model(ids, use_cache=False).last_hidden_state[:, :-1]
            wanted = labels[:, 1:] != -100
            logits = inner.lm_head(hidden[wanted])
            total += functional.cross_entropy(logits, labels[:, 1:][wanted], reduction="sum").item()
            count += int(wanted.sum())
    return total / count


def factors_of(model: PeftModel) -> Factors:
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def assign(model: PeftModel, values: Factors) -> None:
    with torch.no_grad():
        for name, parameter in factors_of(model).items():
            parameter.copy_(values[name])


def signs_of(tuned: Factors, density: float) -> tuple[Factors, float]:
    """(signs of every factor, std of the whole vector)."""
    flat = {name: value.reshape(-1).numpy() for name, value in tuned.items()}
    spread = Spread()
    for values in flat.values():
        spread.add(values)
    threshold = Threshold(spread, density)
    for values in flat.values():
        threshold.add(values)
    threshold.settle()
    signs = {name: threshold.cut(values).astype(np.float32) for name, values in flat.items()}
    return {name: torch.from_numpy(found).view(tuned[name].shape) for name, found in signs.items()}, spread.std


class Rows:
    """The file of results; a measured row is not measured again."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.known = {self.key(row): row for row in map(json.loads, lines)}

    @staticmethod
    def key(row: dict[str, Any]) -> str:
        return json.dumps({k: v for k, v in row.items() if k not in ("loss", "gain_kept", "rank")}, sort_keys=True)

    def get(self, row: dict[str, Any], measure: Any) -> float:
        found = self.known.get(self.key(row))
        if found is None:
            found = row | {"loss": measure()}
            self.known[self.key(row)] = found
            with self.path.open("a") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)
        return float(found["loss"])


def sort_samples(folder: Path, name: str) -> dict[str, list[Sample]]:
    found = [Sample(*each) for each in torch.load(folder / f"{name}.held-back.pt")]
    half = len(found) // 2
    return {
        "validation": sorted(found[:VALIDATION], key=lambda s: len(s.ids)),
        "test": sorted(found[half:], key=lambda s: len(s.ids)),
    }


def balanced(tuned: Factors) -> Factors:
    """The same updates with balanced pairs, in the order of the factors."""
    found = {}
    for name in (n for n in tuned if ".lora_A." in n):
        other = name.replace(".lora_A.", ".lora_B.")
        found[name], found[other] = balanced_factors(tuned[name], tuned[other])
    return {name: found[name] for name in tuned}


def judge(name: str, folder: Path, rows: Rows, densities: tuple[float, ...], forms: tuple[str, ...]) -> None:
    base = AutoModelForCausalLM.from_pretrained(resolve(DEMO), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / name).eval()
    tuned = {n: p.detach().clone() for n, p in factors_of(model).items()}
    parts = sort_samples(folder, name)
    about = {"adapter": name, "rank": ADAPTERS[name]}
    zeros = {n: torch.zeros_like(p) for n, p in tuned.items()}

    def scored(what: dict[str, Any], half: str, values: Factors) -> float:
        def measure() -> float:
            assign(model, values)
            return response_loss(model, parts[half])

        return rows.get({**about, "half": half, **what}, measure)

    for half in parts:
        scored({"what": "base"}, half, zeros)
        scored({"what": "adapter"}, half, tuned)
    for form in forms:
        vector = balanced(tuned) if form == "balanced" else tuned
        for density in densities:
            signs, std = signs_of(vector, density)
            losses: dict[float, float] = {}
            for alpha in (*ALPHAS, None):
                best = min(losses, key=lambda a: losses[a], default=None)
                ended = alpha is None or (len(losses) > 1 and list(losses.values())[-1] > losses[best])
                factor = best if ended else alpha
                ternary = {n: factor * std * each for n, each in signs.items()}
                what = {"what": form, "density": density, "alpha": factor}
                found = scored(what, "test" if ended else "validation", ternary)
                if ended:
                    break
                losses[factor] = found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    parser.add_argument("--forms", nargs="+", default=("balanced", "stored"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = Rows(arguments.results)
    for name in ADAPTERS:
        if (arguments.adapters / f"{name}.held-back.pt").exists():
            judge(name, arguments.adapters, rows, tuple(arguments.densities), tuple(arguments.forms))


if __name__ == "__main__":
    main()
