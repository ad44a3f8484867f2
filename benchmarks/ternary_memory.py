"""Memory and speed of ComPEFT on a whole checkpoint of 7B shape against its base.

    python benchmarks/ternary_memory.py SCRATCH --tokenizer CHECKPOINT [--blocks 32] [--density 0.05]

Writes two random Llamas (hidden 4,096, FFN 11,008, vocabulary 32,000, bfloat16; 32 blocks are 13.5 GB each) to SCRATCH, the
second a small random step from the first, a shard a block; then compresses and expands the difference by the command line.
Prints a JSON line a command: RssAnon + RssShmem at most, imports included, the file's bytes, million entries a second.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from memory import unevictable_bytes
from safetensors.torch import save_file

HIDDEN, FFN, HEADS, VOCABULARY = 4096, 11008, 32, 32000
STEP = 1e-3
"""Standard deviation of the fine-tuning's step, where a weight's is 0.02."""


def shapes(blocks: int) -> list[dict[str, tuple[int, ...]]]:
    """Tensors of every shard, the embedding and the head in the last."""
    found: list[dict[str, tuple[int, ...]]] = []
    for index in range(blocks):
        prefix = f"model.layers.{index}."
        shard: dict[str, tuple[int, ...]] = {f"{prefix}self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        shard |= {f"{prefix}mlp.{n}_proj.weight": (FFN, HIDDEN) for n in ("gate", "up")}
        shard |= {f"{prefix}{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        found.append(shard | {f"{prefix}mlp.down_proj.weight": (HIDDEN, FFN)})
    outside = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return [*found, outside | {"model.norm.weight": (HIDDEN,)}]


def write_pair(base: Path, tuned: Path, blocks: int, tokenizer: Path) -> None:
    shards = shapes(blocks)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
        "num_hidden_layers": blocks, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }  # fmt: skip
    weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    for folder in (base, tuned):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / name)
    generator = torch.Generator().manual_seed(0)
    for name, shard in zip(names, shards, strict=True):
        first = {tensor: 0.02 * torch.randn(shape, generator=generator) for tensor, shape in shard.items()}
        save_file({tensor: value.bfloat16() for tensor, value in first.items()}, base / name)
        second = {t: value.add_(STEP * torch.randn(value.shape, generator=generator)) for t, value in first.items()}
        save_file({tensor: value.bfloat16() for tensor, value in second.items()}, tuned / name)


def measured(arguments: list[str], entries: int, written: Path) -> dict[str, object]:
    peak, started = 0, time.monotonic()
    with subprocess.Popen([sys.executable, "-m", "compresskit", *arguments, "--quiet"], stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, unevictable_bytes(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)}: exit code {process.returncode}")
    seconds = time.monotonic() - started
    size = sum(file.stat().st_size for file in written.glob("*.safetensors"))
    return {
        "command": " ".join(arguments[:2]), "peak_gb": round(peak / 1e9, 3), "seconds": round(seconds),
        "million_entries_a_second": round(entries / seconds / 1e6, 1), "bytes": size,
        "bits_an_entry": round(8 * size / entries, 4),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--density", default="0.05")
    arguments = parser.parse_args()
    base, tuned, small, again = (arguments.scratch / name for name in ("base", "tuned", "small", "again"))
    if not tuned.exists():
        write_pair(base, tuned, arguments.blocks, arguments.tokenizer)
    entries = sum(torch.Size(shape).numel() for shard in shapes(arguments.blocks) for shape in shard.values())
    compress = ["quantize", "compeft", str(tuned), str(small), "--base", str(base), "--density", arguments.density, "--overwrite"]
    expand = ["expand", str(small), str(again), "--base", str(base), "--overwrite"]
    for command, written in ((compress, small), (expand, again)):
        print(json.dumps({"entries": entries} | measured(command, entries, written)), flush=True)


if __name__ == "__main__":
    main()
