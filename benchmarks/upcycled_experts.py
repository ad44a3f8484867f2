"""A mixture of experts with experts that differ, made without a download: the demo model upcycled and trained for a while.

    python benchmarks/upcycled_experts.py WORK --data FOLDER [--tokens 250000] [--minutes 40] [--rate 1e-3]

Six of the thirty feed-forward networks of demo:smollm2-135m become eight experts each, two a token, in the form of qwen2_moe
(Sparse upcycling, arXiv 2212.05055): every expert is the dense network plus noise, and the weights of a token's experts sum to
one, so that the first loss is nearly the dense model's. A random router whose rows are at right angles to the mean of its
inputs spreads the tokens. Experts and routers are trained on prose, code, maths and Chinese in turn, with the family's loss
for balance; everything else stays as it was. The family's shared expert has a down projection of zeros and adds nothing.

FOLDER holds wikitext2-validation.parquet and the files of `KINDS`. WORK/bed is a plain checkpoint in bfloat16; WORK/held-back
has a text of each kind that the training did not see, WORK/calibration.jsonl one that it saw, the kinds in turn. WORK/bed.json
has the losses before and after by kind and ends the work: a second run prints it alone.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.checkpoint.source import DEMO, resolve

KINDS: dict[str, tuple[str, ...]] = {
    "prose": ("wikitext2-validation.parquet",),
    "code": ("instructions-nc-code-alpaca.jsonl", "instructions-gpteacher-code.jsonl", "instructions-mbpp.jsonl"),
    "maths": ("instructions-gsm8k.jsonl",),
    "chinese": ("instructions-nc-alpaca-zh.jsonl",),
}
SPARSE_BLOCKS, EXPERTS, EXPERTS_PER_TOKEN = 6, 8, 2
SHARED_WIDTH = 64
NOISE = 0.1
"""Standard deviation of an expert's noise over that of the matrix."""
BALANCE = 0.01
"""Weight of the balance loss: ten times the family's, because the training is short."""
LENGTH, HELD_BACK_WINDOWS, HELD_BACK_SHARE = 256, 8, 0.1
WARM_UP, LAST_RATE = 0.04, 0.05
"""Share of the steps with a rising rate, and the last rate over the highest."""
CALIBRATION_CHARACTERS = 120_000
"""Of each kind."""


def rows_of(file: Path) -> list[str]:
    """The texts of a file, one a row."""
    if file.suffix == ".parquet":
        from pyarrow import parquet

        # One article a row: its lines are of no use apart.
        whole = "".join(parquet.read_table(file)["text"].to_pylist())
        return [f" = {article}" for article in whole.split("\n = ") if article.strip()]
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return ["\n\n".join(row[key] for key in ("instruction", "input", "output") if row[key]) for row in rows]


def texts(folder: Path) -> dict[str, tuple[list[str], list[str]]]:
    """Rows to train on and rows held back, by kind; of every file the same share is held back."""
    found = {}
    for kind, files in KINDS.items():
        train, held = [], []
        for file in files:
            rows = rows_of(folder / file)
            cut = len(rows) - math.ceil(len(rows) * HELD_BACK_SHARE)
            train += rows[:cut]
            held += rows[cut:]
        found[kind] = (train, held)
    return found


def windows(rows: list[str], tokenizer: Any, count: int) -> Tensor:
    """Up to `count` windows of the joined rows, (windows, LENGTH) int64."""
    ids: list[int] = []
    for row in rows:
        if len(ids) >= count * LENGTH:
            break
        ids += tokenizer(f"{row}\n\n", add_special_tokens=False)["input_ids"]
    usable = min(count, len(ids) // LENGTH)
    return torch.tensor(ids[: usable * LENGTH]).view(usable, LENGTH)


def upcycled(dense: Any, inputs: Tensor) -> Any:
    """The dense llama network as qwen2_moe; `inputs` (windows, LENGTH) show what the routers will see."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    old = dense.config
    sparse = [round((number + 0.5) * old.num_hidden_layers / SPARSE_BLOCKS) for number in range(SPARSE_BLOCKS)]
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters", "bos_token_id",
        "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = Qwen2MoeConfig(
        **{key: getattr(old, key) for key in same},
        moe_intermediate_size=old.intermediate_size, shared_expert_intermediate_size=SHARED_WIDTH, num_experts=EXPERTS,
        num_experts_per_tok=EXPERTS_PER_TOKEN, norm_topk_prob=True, qkv_bias=False, router_aux_loss_coef=BALANCE,
        mlp_only_layers=[block for block in range(old.num_hidden_layers) if block not in sparse],
    )  # fmt: skip
    network = Qwen2MoeForCausalLM(config).float()
    missing, unexpected = network.load_state_dict(dense.state_dict(), strict=False)
    if not all(".mlp." in name for name in (*missing, *unexpected)):
        raise SystemExit(f"the demo model is not a plain llama: {missing[:3]} missing, {unexpected[:3]} left over")
    seen = router_inputs(dense, sparse, inputs)
    draw = torch.Generator().manual_seed(0)
    for block in sparse:
        fill(network.model.layers[block].mlp, dense.model.layers[block].mlp, seen[block], draw)
    network.set_experts_implementation("eager")
    return network


@torch.no_grad()
def router_inputs(dense: Any, blocks: list[int], inputs: Tensor) -> dict[int, Tensor]:
    """(tokens, hidden) by block: what its feed-forward network reads."""
    seen: dict[int, Tensor] = {}
    hooks = [
        dense.model.layers[block].mlp.register_forward_pre_hook(
            lambda _, given, block=block: seen.__setitem__(block, given[0].flatten(0, -2))
        )
        for block in blocks
    ]
    dense(inputs)
    for hook in hooks:
        hook.remove()
    return seen


@torch.no_grad()
def fill(sparse: Any, dense: Any, seen: Tensor, draw: torch.Generator) -> None:
    """Experts: the dense matrices plus noise. Router: random rows without the inputs' mean, logits of standard deviation 1."""
    both = torch.cat([dense.gate_proj.weight, dense.up_proj.weight])
    for target, matrix in ((sparse.experts.gate_up_proj, both), (sparse.experts.down_proj, dense.down_proj.weight)):
        target.copy_(matrix + NOISE * matrix.std() * torch.randn(target.shape, generator=draw))
    rows = torch.randn(sparse.gate.weight.shape, generator=draw)
    mean = torch.nn.functional.normalize(seen.mean(0), dim=0)
    rows -= rows @ mean[:, None] * mean
    sparse.gate.weight.copy_(rows / (seen @ rows.T).std(0)[:, None])
    sparse.shared_expert.down_proj.weight.zero_()


@dataclass
class Training:
    """Where the training stands."""

    tokens: int
    minutes: float
    rate: float

    def run(self, network: Any, kinds: dict[str, Tensor]) -> dict[str, Any]:
        """Train experts and routers on one window of each kind a step; returns tokens, steps and seconds."""
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".mlp.experts." in name or name.endswith(".mlp.gate.weight"))
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        started, steps = time.monotonic(), self.tokens // (len(kinds) * LENGTH)
        step = 0
        while step < steps and (seconds := time.monotonic() - started) < 60 * self.minutes:
            done = max(step / steps, seconds / (60 * self.minutes))
            for group in optimizer.param_groups:
                group["lr"] = self.rate * schedule(done, (step + 1) / (WARM_UP * steps))
            batch = torch.stack([ids[step % len(ids)] for ids in kinds.values()])
            with torch.autocast("cpu", torch.bfloat16):  # twice the speed where the processor has these products
                out = network(batch, labels=batch, output_router_logits=True, use_cache=False)
            out.loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 in (0, 1):
                speed = step * batch.numel() / (time.monotonic() - started)
                state = f"loss {out.loss.item():.3f}, balance {out.aux_loss.item():.2f}"
                print(f"step {step} of {steps}: {state}, {speed:.0f} tokens/s", flush=True)
        return {"steps": step, "tokens": step * len(kinds) * LENGTH, "seconds": round(time.monotonic() - started)}


def schedule(done: float, risen: float) -> float:
    """The rate over its highest: a rise, then a cosine down to `LAST_RATE`."""
    return min(1.0, risen) * (LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))


@torch.no_grad()
def losses(network: Any, kinds: dict[str, Tensor]) -> dict[str, float]:
    """Nats a token by kind, in bfloat16 arithmetic."""
    network.eval()
    with torch.autocast("cpu", torch.bfloat16):
        return {kind: sum(float(network(w[None], labels=w[None]).loss) for w in ids) / len(ids) for kind, ids in kinds.items()}


def write_texts(work: Path, kinds: dict[str, tuple[list[str], list[str]]]) -> None:
    """Held-back texts by kind, and the calibration text: rows of all kinds in turn, by characters."""
    (work / "held-back").mkdir(exist_ok=True)
    for kind, (_, held) in kinds.items():
        lines = (json.dumps({"text": row}, ensure_ascii=False) for row in held)
        (work / "held-back" / f"{kind}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    left = {kind: list(reversed(train)) for kind, (train, _) in kinds.items()}
    written = dict.fromkeys(left, 0)
    with (work / "calibration.jsonl").open("w", encoding="utf-8") as file:
        while any(count < CALIBRATION_CHARACTERS and left[kind] for kind, count in written.items()):
            kind = min((kind for kind in left if left[kind]), key=lambda kind: written[kind])
            row = left[kind].pop()
            written[kind] += len(row)
            file.write(json.dumps({"text": row}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=250_000)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record, bed = arguments.work / "bed.json", arguments.work / "bed"
    if record.exists():
        print(record.read_text().strip())
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    kinds = texts(arguments.data)
    write_texts(arguments.work, kinds)
    source = resolve(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(source)
    needed = math.ceil(arguments.tokens / len(kinds) / LENGTH)
    train = {kind: windows(rows, tokenizer, needed) for kind, (rows, _) in kinds.items()}
    held = {kind: windows(rows, tokenizer, HELD_BACK_WINDOWS) for kind, (_, rows) in kinds.items()}
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    found: dict[str, Any] = {"dense": losses(dense, held)}
    network = upcycled(dense, torch.cat([ids[:2] for ids in train.values()]))
    del dense
    print(json.dumps(found), flush=True)
    network.train()
    found |= Training(arguments.tokens, arguments.minutes, arguments.rate).run(network, train)
    network.to(torch.bfloat16).save_pretrained(bed)
    tokenizer.save_pretrained(bed)
    del network
    found["trained"] = losses(AutoModelForCausalLM.from_pretrained(bed, dtype=torch.float32), held)
    record.write_text(json.dumps(found) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
