"""Half the experts of the bed removed, merged, narrowed or stored in low bits, beside another tool: one table.

    python benchmarks/expert_table.py WORK [--data FOLDER] [--peer VENV] [--rows NAME ...] [--samples 64] [--length 512]
        [--windows 4] [--window-length 512]

WORK is that of upcycled_experts.py: its bed, its calibration text (all methods get this one) and the held-back texts. VENV is an
environment with llmcompressor==0.14.0.1, torch, transformers and pyarrow. Every row is a process with one thread. A result is
opened by stock transformers in float32; KL is of the bed's predictions to its own, in nats a token, over WINDOWS windows of
each text: wikitext2-test of FOLDER as prose and the held-back texts of the other kinds. The bed's logits are kept for all rows.
Speed is of one token after the other, 32 after a prompt of 32, against the bed's right before. Finished rows of
WORK/rows.jsonl are not run again. Prints the rows as Markdown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peer_table import measured
from torch import Tensor

PRUNE, HALF = "prune", ("--sparsity", "0.5")
ROWS: dict[str, tuple[str, ...]] = {
    "reap": (PRUNE, "reap", *HALF),
    "reap --no-refit": (PRUNE, "reap", *HALF, "--no-refit"),
    "llm-compressor reap": ("llm-compressor-reap", *HALF),
    "recover after reap": ("recover", "full"),
    "gptq 8": ("quantize", "gptq", "--bits", "8"),
    "gptq 4": ("quantize", "gptq", "--bits", "4"),
    "cfsp": (PRUNE, "cfsp", "--allocation", "uniform"),
    "m-smoe": (PRUNE, "m-smoe", *HALF),
    "ream": (PRUNE, "ream", *HALF),
    "frequency": (PRUNE, "frequency", *HALF),
    "random-experts": (PRUNE, "random-experts", *HALF),
}
"""By name: the stage, the method and its flags, or the tool of peers.py. cfsp gets the sparsity that gives the bytes of reap."""
RECOVERY = ("--loss", "distill", "--data-weight", "0", "--held-back", "0.05", "--batch-size", "4", "--learning-rate", "2e-4")
SPOKEN = 32


def sparsity_at_equal_bytes(bed: Path) -> float:
    """Share of all feed-forward channels as large as half of the experts."""
    config = json.loads((bed / "config.json").read_text())
    dense = len(config["mlp_only_layers"])
    experts = (config["num_hidden_layers"] - dense) * config["num_experts"]
    return round(0.5 * experts / (experts + dense * config["intermediate_size"] / config["moe_intermediate_size"]), 4)


def command(name: str, arguments: argparse.Namespace, out: Path) -> list[str]:
    """What makes a row's checkpoint."""
    kind, *flags = ROWS[name]
    work: Path = arguments.work
    bed, text = work / "bed", ["--samples", str(arguments.samples)]
    if kind.startswith("llm-compressor"):
        peers = str(Path(__file__).with_name("peers.py"))
        python = str(arguments.peer / "bin" / "python")
        text += ["--text", str(work / "calibration.jsonl"), "--length", str(arguments.length)]
        return [python, peers, kind, str(bed), str(out), *flags, *text]
    source = bed
    text += ["--calibration", str(work / "calibration.jsonl"), "--sequence-length", str(arguments.length)]
    if kind == "recover":
        source = work / "reap"
        flags += ["--original", str(bed), "--text-samples", str(arguments.text_samples), *RECOVERY]
    if name == "cfsp":
        flags += ["--sparsity", str(sparsity_at_equal_bytes(bed))]
    return [sys.executable, "-m", "compresskit", kind, flags[0], str(source), str(out), *flags[1:], *text]


def texts(arguments: argparse.Namespace, tokenizer: Any) -> dict[str, Tensor]:
    """(windows, length) int64 by kind."""
    from pyarrow import parquet

    found = {"prose": "\n\n".join(parquet.read_table(arguments.data / "wikitext2-test.parquet")["text"].to_pylist())}
    for kind in ("code", "maths", "chinese"):
        lines = (arguments.work / "held-back" / f"{kind}.jsonl").read_text(encoding="utf-8").splitlines()
        found[kind] = "\n\n".join(json.loads(line)["text"] for line in lines)
    count, length = arguments.windows, arguments.window_length
    return {
        kind: torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][: count * length]).view(count, length)
        for kind, text in found.items()
    }


def network_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def spoken_per_second(network: Any, prompt: Tensor) -> float:
    """Tokens a second of generation without a choice, prompt (tokens,)."""
    made = {"max_new_tokens": SPOKEN, "min_new_tokens": SPOKEN, "do_sample": False}
    network.generate(prompt[None, :SPOKEN], **made | {"max_new_tokens": 1, "min_new_tokens": 1})
    started = time.process_time()
    network.generate(prompt[None, :SPOKEN], **made)
    return SPOKEN / (time.process_time() - started)


@torch.no_grad()
def scored(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """KL and top-1 agreement by kind, perplexity of the prose, and the speed against the bed's."""
    from transformers import AutoTokenizer

    kinds = texts(arguments, AutoTokenizer.from_pretrained(arguments.work / "bed"))
    kept = arguments.work / f"logits-{arguments.windows}x{arguments.window_length}"
    bed = network_of(arguments.work / "bed")
    if not kept.exists():
        kept.mkdir()
        for kind, windows in kinds.items():
            torch.save(torch.stack([bed(window[None]).logits[0] for window in windows]), kept / f"{kind}.pt")
    network = network_of(folder)
    found: dict[str, Any] = {"kl": {}, "top1": {}, "loss": {}}
    for kind, windows in kinds.items():
        kl = same = loss = 0.0
        for window, reference in zip(windows, torch.load(kept / f"{kind}.pt", mmap=True), strict=True):
            logits = network(window[None]).logits[0]
            told, expected = logits.log_softmax(-1), reference.log_softmax(-1)
            kl += float(torch.nn.functional.kl_div(told, expected, log_target=True, reduction="sum")) / len(window)
            same += float((logits.argmax(-1) == reference.argmax(-1)).double().mean())
            loss += float(torch.nn.functional.cross_entropy(logits[:-1], window[1:]))
        for key, value in (("kl", kl), ("top1", same), ("loss", loss)):
            found[key][kind] = value / len(windows)
    prompt = kinds["prose"][0]
    found["speed_ratio"] = round(spoken_per_second(network, prompt) / spoken_per_second(bed, prompt), 2)
    return found


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make and score a row; the checkpoint stays, since recover reads that of reap."""
    out = arguments.work / name.replace(" ", "-").replace("--", "")
    shutil.rmtree(out, ignore_errors=True)
    found = {"name": name, "samples": arguments.samples, "length": arguments.length}
    found |= measured(command(name, arguments, out))
    found["bytes"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return found | scored(out, arguments)


def printed(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    kinds = ("prose", "code", "maths", "chinese")
    lines = [
        f"| | MB | {' | '.join(f'KL, {kind}' for kind in kinds)} | top-1, prose | speed | processor, s | peak, GB |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        kl = " | ".join(f"{row['kl'][kind]:.3f}" for kind in kinds)
        rest = f"{row['top1']['prose']:.3f} | {row['speed_ratio']:.2f} | {row['processor_seconds']} | {row['peak_gb']}"
        lines.append(f"| {row['name']} | {row['bytes'] / 1e6:.0f} | {kl} | {rest} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--window-length", type=int, default=512)
    parser.add_argument("--text-samples", type=int, default=64, help="windows that recover trains on")
    arguments = parser.parse_args()
    results = arguments.work / "rows.jsonl"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    known = {row["name"] for row in found}
    for name in arguments.rows or [name for name in ROWS if arguments.peer or not name.startswith("llm-compressor")]:
        if name not in known:
            found.append(run(name, arguments))
            results.open("a").write(json.dumps(found[-1]) + "\n")
            print(json.dumps(found[-1]), flush=True)
    print(printed(found))


if __name__ == "__main__":
    main()
