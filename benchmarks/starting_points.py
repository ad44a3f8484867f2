"""Copies of the demo that compute the same and are said to round better: rotations of the residual stream.

    python benchmarks/starting_points.py rotated|rotated-hadamard|untied OUT --text FILE

rotated: R1 of SpinQuant (arXiv 2405.16406): norms are folded into the linears behind them, then every writer and
reader of the residual stream is turned by one orthogonal matrix, random or of Hadamard blocks; the head is untied. untied:
norms folded and head untied alone. Quantize OUT as any other model, and compare with the demo itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compresskit.checkpoint.source import DEMO, resolve

LENGTH = 512


def first_window(text: Path, tokenizer: Any) -> Tensor:
    """(1, LENGTH) token ids."""
    from pyarrow import parquet

    return torch.tensor([tokenizer("\n\n".join(parquet.read_table(text)["text"].to_pylist()))["input_ids"][:LENGTH]])


def fold_norms(network: Any) -> None:
    """Fold every norm into the linears behind it, and untie the head."""
    head = torch.nn.Linear(network.config.hidden_size, network.config.vocab_size, bias=False)
    head.weight.copy_(network.model.embed_tokens.weight)
    network.lm_head, network.config.tie_word_embeddings = head, False
    for block in network.model.layers:
        attention, ffn = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (ffn.gate_proj, ffn.up_proj)),
        ):
            for linear in readers:
                linear.weight.mul_(norm.weight)
            norm.weight.fill_(1)
    head.weight.mul_(network.model.norm.weight)
    network.model.norm.weight.fill_(1)


def orthogonal(size: int, hadamard: bool) -> Tensor:
    """An orthogonal matrix (size, size): random, or Hadamard blocks of the largest power of two, mixed by a random one."""
    generator = torch.Generator().manual_seed(0)
    random: Callable[[int], Tensor] = lambda n: torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]  # noqa: E731
    if not hadamard:
        return random(size)
    power = size & -size
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < power:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return torch.kron(random(size // power).contiguous(), block / power**0.5) * signs


def rotate(network: Any, turn: Tensor) -> None:
    """Turn the residual stream, h -> h R: readers W -> W R, writers W -> R^T W."""
    read: Callable[[Tensor], Tensor] = lambda weight: (weight.double() @ turn).float()  # noqa: E731
    for block in network.model.layers:
        attention, ffn = block.self_attn, block.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, ffn.gate_proj, ffn.up_proj):
            linear.weight.copy_(read(linear.weight))
        for linear in (attention.o_proj, ffn.down_proj):
            linear.weight.copy_((turn.T @ linear.weight.double()).float())
    network.model.embed_tokens.weight.copy_(read(network.model.embed_tokens.weight))
    network.lm_head.weight.copy_(read(network.lm_head.weight))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["rotated", "rotated-hadamard", "untied"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    arguments = parser.parse_args()
    source = resolve(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(source)
    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    window = first_window(arguments.text, tokenizer)
    before = network(window).logits.log_softmax(-1)
    fold_norms(network)
    if arguments.kind != "untied":
        rotate(network, orthogonal(network.config.hidden_size, arguments.kind == "rotated-hadamard"))
    after = network(window).logits.log_softmax(-1)
    print("KL to the demo", float((before.exp() * (before - after)).sum(-1).mean()))
    network.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
