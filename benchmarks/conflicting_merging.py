"""Merge three LoRA adapters that contradict each other: upper case, lower case and reversed words, on the same instructions.

    python benchmarks/conflicting_merging.py train --data FOLDER --out FOLDER [--steps 40]
    python benchmarks/conflicting_merging.py score --out FOLDER --results FILE.jsonl --merged FOLDER...
    python benchmarks/conflicting_merging.py twin --out FOLDER --results FILE.jsonl [--shared FOLDER] [--rank 2]

train: FOLDER of --data holds instructions-dolly.jsonl. Every adapter OUT/TASK learns its own form of the same answers to the
same prompts, from the same start. OUT/TASK.held-back.pt has its samples that training never saw, OUT/TASK.jsonl their first
quarter as text, for `compresskit merge --validation`; the second half judges.
score: the normalised gain of merged adapters, as ternary_merging.py defines it: (base - merged) / (base - own) in loss of a
response token, and its mean over the tasks.
twin: Twin-Merging (arXiv 2406.15479) without its router: the shared adapter plus, for each task, what it lacks of the task's own
update at a rank; prints the gains with the bytes of all parts as a share of the three adapters'. Without --shared the
three adapters are each cut to the rank: what the same bytes hold without a merge.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from ternary_merging import test_loss
from ternary_quality import Rows, response_loss, sort_samples
from ternary_training import Sample, optimise
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.checkpoint.source import DEMO, resolve
from compresskit.formats.peft import open_adapter
from compresskit.numerics.truncation import truncated

FORMS = {
    "upper": str.upper,
    "lower": lambda text: re.sub(r"[^\w\s]", "", text.lower()),
    "reversed": lambda text: " ".join(reversed(text.split())),
}
"""Task -> what becomes of an answer."""
SYSTEM = "Answer."
LONGEST = 64
"""Tokens of a sample in its longest form; longer ones are left out of all tasks."""
SHORTEST_WORDS = 4
HELD_BACK = 64
BATCH = 8
RANK, LORA_ALPHA, FIRST_BLOCK = 8, 16, 15
"""The adapters change the upper half of the 30 blocks, which halves the backward pass."""
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    turns = ("system", SYSTEM), ("user", question), ("assistant", answer)
    return [{"role": role, "content": content} for role, content in turns]


def sample(tokenizer: AutoTokenizer, question: str, answer: str) -> Sample:
    turns = conversation(question, answer)
    start = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    ids = tokenizer(start)["input_ids"]
    return Sample(ids + tokenizer(whole.removeprefix(start))["input_ids"], len(ids))


def pairs(data: Path, tokenizer: AutoTokenizer, count: int) -> list[tuple[str, str]]:
    """Questions with short answers, which fit in every form."""
    found = []
    for line in (data / "instructions-dolly.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, answer = row["instruction"], row["output"]
        if row["input"] or len(answer.split()) < SHORTEST_WORDS or "\n" in answer:
            continue
        if all(len(sample(tokenizer, question, form(answer)).ids) <= LONGEST for form in FORMS.values()):
            found.append((question, answer))
        if len(found) == count:
            break
    return found


def train(task: str, rows: list[tuple[str, str]], tokenizer: AutoTokenizer, out: Path, steps: int) -> dict[str, object]:
    found = [sample(tokenizer, question, FORMS[task](answer)) for question, answer in rows]
    held_back, training = found[:HELD_BACK], found[HELD_BACK:]
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_pretrained(resolve(DEMO), dtype=torch.float32)
    blocks = list(range(FIRST_BLOCK, network.config.num_hidden_layers))
    config = LoraConfig(r=RANK, lora_alpha=LORA_ALPHA, target_modules=LINEARS, layers_to_transform=blocks, task_type="CAUSAL_LM")
    model = get_peft_model(network, config)
    started = time.process_time()
    losses = optimise(model, training, BATCH, steps)
    model.save_pretrained(out / task)
    turns = [conversation(question, FORMS[task](answer)) for question, answer in rows[: HELD_BACK // 4]]
    texts = [tokenizer.apply_chat_template(each, tokenize=False) for each in turns]
    (out / f"{task}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    torch.save([tuple(each) for each in held_back], out / f"{task}.held-back.pt")
    ends = [sum(part) / len(part) for part in (losses[:5], losses[-5:])]
    return {"adapter": task, "samples": len(training), "first_loss": ends[0], "last_loss": ends[1],
            "cpu_seconds": round(time.process_time() - started, 1)}  # fmt: skip


def gains(rows: Rows, out: Path, name: str, losses: dict[str, float]) -> None:
    """Print the normalised gain of each task's loss, and their mean."""
    found = {}
    for task in FORMS:
        what = {"task": task, "half": "test"}
        base = rows.get({**what, "what": "base"}, lambda t=task: test_loss(out / t, t, out, base=True))
        own = rows.get({**what, "what": "adapter"}, lambda t=task: test_loss(out / t, t, out))
        found[task] = (base - losses[task]) / (base - own)
    print(json.dumps({"merged": name, "gains": found, "mean": sum(found.values()) / len(found)}), flush=True)


def score(rows: Rows, out: Path, merged: Path) -> None:
    what = {"half": "test", "what": merged.name}
    gains(rows, out, merged.name, {t: rows.get({"task": t, **what}, lambda t=t: test_loss(merged, t, out)) for t in FORMS})


def twin(rows: Rows, out: Path, shared: Path | None, rank: int) -> None:
    """Shared update plus the best rank-r part of (own - shared), in the weights of the demo model; without one, of own alone."""
    own = {task: open_adapter(out / task) for task in FORMS}
    common = open_adapter(shared) if shared else None
    names = own["upper"].names
    ranks = (common.rank(names[0]) if common else 0) + len(FORMS) * rank
    losses = {}
    for task in FORMS:

        def measure(task: str = task) -> float:
            network = AutoModelForCausalLM.from_pretrained(resolve(DEMO), dtype=torch.float32).eval()
            with torch.no_grad():
                for name in names:
                    first = common.update(name) if common else torch.tensor(0.0)
                    a, b = truncated(own[task].update(name) - first, rank)
                    network.get_submodule(name.removesuffix(".weight")).weight += first + b @ a
            return response_loss(Whole(network), sort_samples(out, task)["test"])  # type: ignore[arg-type]

        what = f"twin-{shared.name if shared else 'none'}-{rank}"
        losses[task] = rows.get({"task": task, "half": "test", "what": what}, measure)
    gains(rows, out, f"twin on {shared}, rank {rank}, {ranks / (len(FORMS) * RANK):.2f} of the bytes", losses)


class Whole(NamedTuple):
    """A network in the place of an adapted one."""

    network: torch.nn.Module

    def get_base_model(self) -> torch.nn.Module:
        return self.network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "score", "twin"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--merged", type=Path, nargs="+", default=[])
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--rank", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.what == "train":
        tokenizer = AutoTokenizer.from_pretrained(resolve(DEMO))
        rows = pairs(arguments.data, tokenizer, HELD_BACK + arguments.steps * BATCH)
        for task in FORMS:
            if not (arguments.out / f"{task}.held-back.pt").exists():
                print(json.dumps(train(task, rows, tokenizer, arguments.out, arguments.steps)), flush=True)
        return
    results = Rows(arguments.results)
    for merged in arguments.merged:
        score(results, arguments.out, merged)
    if arguments.what == "twin":
        twin(results, arguments.out, arguments.shared, arguments.rank)


if __name__ == "__main__":
    main()
