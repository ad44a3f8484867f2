"""Train small LoRA adapters of SmolLM2 on instruction files with stock transformers and peft, for ternary_quality.py.

    python benchmarks/ternary_training.py --data FOLDER --out FOLDER [--steps 36]

FOLDER of --data holds instructions-NAME.jsonl with the keys instruction, input and output. For every adapter OUT/NAME gets
the PEFT folder and OUT/NAME.held-back.pt its samples that training never saw: the first half picks alpha (validation),
the second judges (test). Finished adapters are not trained again. All adapters of a rank start from the same seed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.checkpoint.source import DEMO, resolve

ADAPTERS = {
    "gsm8k": 16, "nc-alpaca-zh": 16, "nc-code-alpaca": 16, "t0": 8, "multilingual": 64, "gpteacher-tools": 8, "dolly": 64,
}  # fmt: skip
"""Instruction file -> rank; the first three, of one rank, are those that are merged."""
LONGEST = 88
"""Tokens of a sample; longer ones are left out."""
BATCH = 4
HELD_BACK = 32
LORA_ALPHA = 32
LEARNING_RATE = 2e-3


class Sample(NamedTuple):
    """One prompt and its response."""

    ids: list[int]
    """Tokens, the response's last."""
    prompt: int
    """Tokens of the prompt, which carry no loss."""


def samples(file: Path, tokenizer: AutoTokenizer, count: int) -> list[Sample]:
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        start = tokenizer(prompt)["input_ids"]
        ids = start + tokenizer(row["output"] + "<|im_end|>")["input_ids"]
        if len(ids) <= LONGEST:
            found.append(Sample(ids, len(start)))
        if len(found) == count:
            break
    return found


def padded(batch: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels), both (samples, tokens); labels are -100 outside the responses."""
    length = max(len(sample.ids) for sample in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    labels = torch.full((len(batch), length), -100)
    for row, sample in enumerate(batch):
        ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        labels[row, sample.prompt : len(sample.ids)] = torch.tensor(sample.ids[sample.prompt :])
    return ids, labels


def optimise(model: PeftModel, training: list[Sample], batch: int, steps: int) -> list[float]:
    """Train the adapter in place on batches drawn from the samples; the loss of every step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    order, losses = random.Random(0), []
    for _ in range(steps):
        ids, labels = padded(order.sample(training, batch))
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def train(name: str, rank: int, data: Path, out: Path, steps: int) -> dict[str, object]:
    folder = resolve(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = samples(data / f"instructions-{name}.jsonl", tokenizer, HELD_BACK + steps * BATCH)
    held_back, training = found[:HELD_BACK], found[HELD_BACK:]
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=LORA_ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config)
    started = time.monotonic()
    losses = optimise(model, training, BATCH, steps)
    model.save_pretrained(out / name)
    torch.save([tuple(sample) for sample in held_back], out / f"{name}.held-back.pt")
    ends = [sum(part) / len(part) for part in (losses[:10], losses[-10:])]
    return {"adapter": name, "rank": rank, "steps": steps, "samples": len(training), "first_loss": ends[0],
            "last_loss": ends[1], "seconds": round(time.monotonic() - started, 1)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=36)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rank in ADAPTERS.items():
        if not (arguments.out / f"{name}.held-back.pt").exists():
            print(json.dumps(train(name, rank, arguments.data, arguments.out, arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
