"""Peak memory of a stage on a random Llama larger than the budget: a few blocks' worth, whatever the depth.

    python benchmarks/memory.py FOLDER --tokenizer CHECKPOINT --text FILE [--blocks 24] [--shape 2048,8192,16]
        [--samples 32] [--sequence-length 512] [--stage "quantize gptq --bits 3"] [--stop-after N]

Writes a random Llama (of this hidden size, FFN and heads, bfloat16) to FOLDER shard by shard unless it is there, runs the
command line on it and samples RssAnon + RssShmem of the process from /proc ten times a second: resident memory that the kernel
cannot drop; mapped pages of the weight files do not count. The same after the imports alone is subtracted.
`--stop-after` ends the run after that many finished blocks: the peak of a block does not depend on how many follow.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

IMPORTS = (
    "import time, torch, transformers.models.llama.modeling_llama, compresskit.pruning.run, compresskit.quantization.run\n"
    "print('ready', flush=True); time.sleep(60)"
)


SHAPE = (2048, 8192, 16)
"""Hidden size, channels of a feed-forward network, attention heads."""


def write_model(folder: Path, blocks: int, tokenizer: Path, shape: tuple[int, int, int] = SHAPE) -> None:
    """One shard a block, so that no more than a block is in memory."""
    hidden, ffn, heads = shape
    folder.mkdir(parents=True)
    source = json.loads((tokenizer / "config.json").read_text())
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": heads, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": source["vocab_size"], "dtype": "bfloat16",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    weight_map: dict[str, str] = {}
    for shard in range(blocks + 1):
        tensors = _block(shard, hidden, ffn) if shard < blocks else _outside(int(source["vocab_size"]), hidden)
        name = f"model-{shard + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _random(*shape: int) -> torch.Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(torch.bfloat16)


def _block(index: int, hidden: int, ffn: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(index)
    prefix = f"model.layers.{index}."
    tensors = {f"{prefix}self_attn.{name}_proj.weight": _random(hidden, hidden) for name in "qkvo"}
    tensors |= {f"{prefix}mlp.{name}_proj.weight": _random(ffn, hidden) for name in ("gate", "up")}
    norms = ("input_layernorm", "post_attention_layernorm")
    tensors |= {f"{prefix}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
    return tensors | {f"{prefix}mlp.down_proj.weight": _random(hidden, ffn)}


def _outside(vocabulary: int, hidden: int) -> dict[str, torch.Tensor]:
    return {
        "model.embed_tokens.weight": _random(vocabulary, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }


def unevictable_bytes(pid: int) -> int:
    """RssAnon + RssShmem of a process, 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))


def memory_of_imports() -> int:
    with subprocess.Popen([sys.executable, "-c", IMPORTS], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        found = unevictable_bytes(process.pid)
        process.kill()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--shape", type=lambda text: tuple(map(int, text.split(","))), default=SHAPE)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--stage", default="prune cfsp", help="stage, method and their flags")
    parser.add_argument("--stop-after", type=int, default=0)
    arguments = parser.parse_args()
    if not arguments.folder.exists():
        write_model(arguments.folder, arguments.blocks, arguments.tokenizer, arguments.shape)
    out = arguments.folder.with_name(arguments.folder.name + "-smaller")
    stage, method, *flags = shlex.split(arguments.stage)
    command = [
        sys.executable, "-m", "compresskit", stage, method, str(arguments.folder), str(out), "--overwrite",
        "--calibration", str(arguments.text), "--samples", str(arguments.samples),
        "--sequence-length", str(arguments.sequence_length), *flags,
    ]  # fmt: skip
    progress = out.with_name(out.name + ".partial") / "progress.json"
    shutil.rmtree(progress.parent, ignore_errors=True)
    imports, peak, started, done = memory_of_imports(), 0, time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak = max(peak, unevictable_bytes(process.pid))
            done = len(json.loads(progress.read_text())["blocks"]) if progress.exists() else done
            if arguments.stop_after and done >= arguments.stop_after:
                process.send_signal(signal.SIGINT)
                process.wait()
            time.sleep(0.1)
    result = {
        "blocks": arguments.blocks, "finished_blocks": done, "stage": arguments.stage, "samples": arguments.samples,
        "sequence_length": arguments.sequence_length, "peak_gb": round(peak / 1e9, 3),
        "imports_gb": round(imports / 1e9, 3), "peak_above_imports_gb": round((peak - imports) / 1e9, 3),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
