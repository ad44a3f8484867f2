"""Copies of the demo that compute the same and are said to round better: AWQ's scaling, and rotations of the residual stream.

    python benchmarks/starting_points.py scaled|rotated|rotated-hadamard|untied OUT --text FILE [--bits 3] [--samples 32]

scaled: AWQ (arXiv 2306.00978, equations 4 and 5): the inputs of a group of linears are divided by s = mean|x|^alpha, alpha of 20
values by the least error of the outputs after rounding to nearest, and s is folded into the norm before them, or into `up`
before `down`. rotated: R1 of SpinQuant (arXiv 2405.16406): norms are folded into the linears behind them, then every writer and
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
from compresskit.numerics.grid import from_codes, min_max_grid, to_codes
from compresskit.numerics.scheme import Scheme

LENGTH, GROUP_SIZE, STEPS = 512, 64, 20


def windows_of(text: Path, tokenizer: Any, samples: int) -> Tensor:
    """(samples, LENGTH) token ids, drawn evenly from the text."""
    from pyarrow import parquet

    ids = torch.tensor(tokenizer("\n\n".join(parquet.read_table(text)["text"].to_pylist()))["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    return windows[torch.linspace(0, len(windows) - 1, samples).long()]


class Inputs:
    """Mean magnitude (in,) and second moments (in, in) of a linear's inputs."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        self.magnitude, self.gram, self.tokens = (
            torch.zeros(linear.in_features),
            torch.zeros(linear.in_features, linear.in_features),
            0,
        )
        linear.register_forward_pre_hook(self.add)

    def add(self, _: torch.nn.Module, given: tuple[Tensor, ...]) -> None:
        x = given[0].flatten(0, -2)
        self.magnitude += x.abs().sum(0)
        self.gram += x.T @ x
        self.tokens += len(x)


def output_error(weights: list[Tensor], scale: Tensor, gram: Tensor, scheme: Scheme) -> float:
    """The sum of tr(dW H dW^T), dW = Q(W s) / s - W."""
    total = 0.0
    for weight in weights:
        grid = min_max_grid(weight * scale, scheme, torch.float32)
        off = from_codes(to_codes(weight * scale, grid, scheme), grid, scheme) / scale - weight
        total += float(((off @ gram) * off).sum())
    return total


def best_scale(weights: list[Tensor], inputs: Inputs, scheme: Scheme) -> tuple[Tensor, float]:
    """The scaling (in,) of the least error, and that error relative to no scaling."""
    mean = (inputs.magnitude / inputs.tokens).clamp_min(1e-4)
    found = []
    for step in range(STEPS):
        scale = mean ** (step / STEPS)
        scale = scale / (scale.max() * scale.min()).sqrt()
        found.append((output_error(weights, scale, inputs.gram, scheme), scale))
    error, scale = min(found, key=lambda each: each[0])
    return scale, error / found[0][0]


def scale_model(network: Any, windows: Tensor, scheme: Scheme) -> None:
    """AWQ's scaling of every block, by the statistics of the dense network."""
    blocks = network.model.layers
    seen = [
        {
            name: Inputs(linear)
            for name, linear in (("q", b.self_attn.q_proj), ("gate", b.mlp.gate_proj), ("down", b.mlp.down_proj))
        }
        for b in blocks
    ]
    for window in windows:
        network(window[None])
    for block, inputs in zip(blocks, seen, strict=True):
        attention, ffn = block.self_attn, block.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        said = []
        for linears, name, writer in (
            (readers, "q", block.input_layernorm),
            ([ffn.gate_proj, ffn.up_proj], "gate", block.post_attention_layernorm),
            ([ffn.down_proj], "down", ffn.up_proj),
        ):
            scale, ratio = best_scale([linear.weight for linear in linears], inputs[name], scheme)
            said.append(round(ratio, 3))
            for linear in linears:
                linear.weight.mul_(scale)
            writer.weight.div_(scale if writer.weight.ndim == 1 else scale[:, None])
        print(*said, flush=True)


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
    parser.add_argument("kind", choices=["scaled", "rotated", "rotated-hadamard", "untied"])
    parser.add_argument("out", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    source = resolve(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(source)
    network = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    windows = windows_of(arguments.text, tokenizer, arguments.samples)
    before = network(windows[:1]).logits.log_softmax(-1)
    if arguments.kind == "scaled":
        scale_model(network, windows, Scheme(arguments.bits, GROUP_SIZE, False))
    else:
        fold_norms(network)
        if arguments.kind != "untied":
            rotate(network, orthogonal(network.config.hidden_size, arguments.kind == "rotated-hadamard"))
    after = network(windows[:1]).logits.log_softmax(-1)
    print("KL to the demo", float((before.exp() * (before - after)).sum(-1).mean()))
    network.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
