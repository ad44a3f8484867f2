"""The checkpoint that another tool makes of the same model on as many tokens of the same text, its time and peak memory.

    PEER/bin/python benchmarks/peers.py TOOL MODEL OUT --text FILE.parquet [--bits 3] [--samples 64] [--length 512] [--blocks N]
    PEER/bin/python benchmarks/peers.py auto-round MODEL OUT --text FILE.parquet [--iterations 200] [--extension]
    PEER/bin/python benchmarks/peers.py llm-compressor-scheme MODEL OUT --text FILE.parquet --scheme NVFP4A16 [--gptq]
    PEER/bin/python benchmarks/peers.py llm-compressor-reap MODEL OUT --text FILE.jsonl [--sparsity 0.5]

TOOL is llm-compressor (GPTQ, static act-order, damping 1%), llm-compressor-scheme (one of its preset schemes, rounded to
nearest or by GPTQ), llm-compressor-reap (a share of the experts removed) or auto-round (sign-gradient rounding; its default is
200 iterations, its `best` preset 1,000, and its advice for two bits is `best` with `enable_alg_ext`, here `--extension`). The
interpreter is that of an environment that holds the tool, torch and pyarrow, and nothing of compresskit. Group 64, asymmetric,
windows drawn evenly from the text. Prints one JSON line; OUT is in compressed-tensors, or of AutoRound a dense checkpoint of the
rounded weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

GROUP_SIZE, KIB = 64, 1024


def windows_of(text: Path, tokenizer: Any, samples: int, length: int) -> torch.Tensor:
    """(samples, length) int64."""
    if text.suffix == ".jsonl":
        rows = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    else:
        from pyarrow import parquet

        rows = parquet.read_table(text)["text"].to_pylist()
    whole = "\n\n".join(rows)
    ids = torch.tensor(tokenizer(whole, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // length * length].view(-1, length)
    return windows[torch.linspace(0, len(windows) - 1, samples).long()]


def llm_compressor(model: Any, tokenizer: Any, windows: torch.Tensor, out: Path, arguments: argparse.Namespace) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = {"num_bits": arguments.bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": GROUP_SIZE}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    one_shot(
        model,
        tokenizer,
        windows,
        out,
        GPTQModifier(
            config_groups=groups,
            ignore=["lm_head", *later_blocks(model, arguments.blocks)],
            actorder="static",
            dampening_frac=0.01,
        ),
    )


def preset_scheme(model: Any, tokenizer: Any, windows: torch.Tensor, out: Path, arguments: argparse.Namespace) -> None:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    modifier = GPTQModifier if arguments.gptq else QuantizationModifier
    one_shot(model, tokenizer, windows, out, modifier(targets="Linear", scheme=arguments.scheme, ignore=["lm_head"]))


def reap(model: Any, tokenizer: Any, windows: torch.Tensor, out: Path, arguments: argparse.Namespace) -> None:
    from llmcompressor.modifiers.pruning.reap import REAPPruningModifier

    recipe = REAPPruningModifier(sparsity=arguments.sparsity)
    one_shot(model, tokenizer, windows, out, recipe, moe_calibrate_all_experts=False)  # its modifier says it needs no others


def one_shot(model: Any, tokenizer: Any, windows: torch.Tensor, out: Path, recipe: Any, **settings: Any) -> None:
    from datasets import Dataset
    from llmcompressor import oneshot

    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    oneshot(
        model=model, tokenizer=tokenizer, dataset=data, recipe=recipe, max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows), output_dir=str(out), **settings,
    )  # fmt: skip


def loading(tool: str) -> AbstractContextManager[Any]:
    """How a tool wants a model loaded: REAP of llm-compressor with experts as plain linears."""
    if tool != "llm-compressor-reap":
        return nullcontext()
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe

    found: AbstractContextManager[Any] = load_quantizable_moe()
    return found


def first_blocks(count: int | None) -> list[list[str]] | None:
    """Names of the first blocks, as one run of blocks; None for all."""
    return None if count is None else [[f"model.layers.{block}" for block in range(count)]]


def later_blocks(model: Any, count: int | None) -> list[str]:
    """Pattern of the linears of all blocks but the first."""
    if count is None:
        return []
    return [rf"re:model\.layers\.{block}\..*" for block in range(count, model.config.num_hidden_layers)]


def auto_round(model: Any, tokenizer: Any, windows: torch.Tensor, out: Path, arguments: argparse.Namespace) -> None:
    from auto_round import AutoRound

    bits, iterations = arguments.bits, arguments.iterations
    rounding = AutoRound(
        model, tokenizer, scheme=f"W{bits}A16", bits=bits, group_size=GROUP_SIZE, sym=False, iters=iterations,
        nsamples=len(windows), seqlen=windows.shape[1], dataset=list(windows.unsqueeze(1)), device_map="cpu",
        enable_alg_ext=arguments.extension, to_quant_block_names=first_blocks(arguments.blocks),
    )  # fmt: skip
    # Its packed file of two bits gives NaN in transformers 5.24 on a CPU, its `fake` format the weights of a float32 source
    # unrounded; the model in memory holds the rounded weights.
    rounded, _ = rounding.quantize()
    rounded.save_pretrained(out)
    tokenizer.save_pretrained(out)


TOOLS = {
    "llm-compressor": llm_compressor, "llm-compressor-scheme": preset_scheme, "llm-compressor-reap": reap,
    "auto-round": auto_round,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=list(TOOLS))
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--scheme", default="FP8_DYNAMIC")
    parser.add_argument("--gptq", action="store_true")
    parser.add_argument("--sparsity", type=float, default=0.5, help="the share of experts that llm-compressor-reap removes")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--blocks", type=int, help="the first blocks alone (llm-compressor, auto-round); the others stay dense")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--extension", action="store_true", help="auto-round's enable_alg_ext")
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    with loading(arguments.tool):
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    windows = windows_of(arguments.text, tokenizer, arguments.samples, arguments.length)
    started, worked = time.monotonic(), time.process_time()
    TOOLS[arguments.tool](model, tokenizer, windows, arguments.out, arguments)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    print(json.dumps({
        "tool": arguments.tool, "bits": arguments.bits, "samples": arguments.samples,
        **({"iterations": arguments.iterations, "extension": arguments.extension} if arguments.tool == "auto-round" else {}),
        "processor_seconds": round(time.process_time() - worked), "seconds": round(time.monotonic() - started),
        "peak_gb": round(peak / 1e9, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
