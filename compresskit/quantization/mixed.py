"""Mixed precision: choose bits per block by the model's loss when only that block is rounded.

    minimise sum_l KL_l(b_l)    subject to    sum_l n_l b_l <= average * sum_l n_l

symbol  meaning                                                              name here
KL_l(b) divergence from the original when only block l is rounded to b bits  losses[l][b]
n_l     weights of block l                                                   sizes[l]

Greedy: all blocks start at the fewest bits; the block that gains most per bit moves up a level while the budget lasts. All
linears of a block have the same bits, so that readers can fuse q, k and v, or gate and up.

One walk measures the losses: each candidate is a separate stream of hidden states, split off at its block and run through
the original blocks after it. Rounding is GPTQ's (error_feedback.py), on the original's activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from compresskit import distributed
from compresskit.machine.precision import torch_dtype
from compresskit.numerics.grid import from_codes, min_max_grid
from compresskit.numerics.scheme import Scheme
from compresskit.quantization.error_feedback import Feedback, feedback, round_with_feedback
from compresskit.quantization.request import QuantizeRequest
from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock, chosen_sequence, collected, replace_weight
from compresskit.walk.walk import Walk

DAMPING = 0.01
Losses = list[dict[int, float]]
"""By block, then by bits: the KL divergence in nats per token."""


def allocate_bits(losses: Losses, sizes: Sequence[int], average: float) -> list[int]:
    """Choose the bits of every block; their mean weighted by `sizes` is at most `average`. All blocks have the same levels."""
    levels = sorted(losses[0])
    chosen = [levels[0]] * len(losses)
    budget = average * sum(sizes) - levels[0] * sum(sizes)
    while True:
        steps = []
        for block, bits in enumerate(chosen):
            for higher in levels[levels.index(bits) + 1 :]:
                cost = (higher - bits) * sizes[block]
                if cost <= budget + 1e-9:
                    steps.append(((losses[block][bits] - losses[block][higher]) / cost, -block, higher, cost))
        if not steps or max(steps)[0] <= 0:
            return chosen
        _, block, bits, cost = max(steps)
        chosen[-block] = bits
        budget -= cost


@torch.no_grad()
def block_losses(request: QuantizeRequest, walk: Walk, levels: Sequence[Scheme], on_block: OnBlock) -> Losses:
    """Measure the divergence in nats per token when only one block is rounded, for every block and level."""
    streams: dict[tuple[int, int], list[Tensor]] = {}
    count = walk.model.block_count
    for block in walk:
        for stream in streams.values():
            stream[:] = block.run_all(stream)
        for bits, outputs in _rounded_outputs(block, request, levels).items():
            streams[block.index, bits] = outputs
        on_block("sensitivity", block.index + 1, count)
    found: list[list[float]] = []
    for number, (_, hidden, head) in enumerate(walk.heads()):
        reference = head(hidden).float().log_softmax(dim=-1)
        found.append([_divergence(head(stream[number]), reference) for stream in streams.values()])
    found = distributed.in_order(found, len(walk.all_batches))
    losses: Losses = [{} for _ in range(count)]
    tokens = sum(batch.numel() for batch in walk.all_batches)
    for (index, bits), values in zip(streams, zip(*found, strict=True), strict=True):
        losses[index][bits] = sum(values) / tokens
    return losses


def _divergence(logits: Tensor, reference: Tensor) -> float:
    found = logits.float().log_softmax(dim=-1)
    return float(functional.kl_div(found, reference, log_target=True, reduction="sum"))


def _rounded_outputs(block: Block, request: QuantizeRequest, levels: Sequence[Scheme]) -> dict[int, list[Tensor]]:
    """The block's outputs on its current inputs, rounded to each level in turn; the block itself is unchanged."""
    groups = [group for position in chosen_sequence(request.model, block.index, request.schemes) for group in position]
    if not groups:
        return {scheme.bits: block.run_all(block.hidden) for scheme in levels}
    grams = collected(groups, block, attention_is_final=False)
    originals = {name: block.linear(name).weight for group in groups for name in group}
    passed = {}
    for name in list(grams):
        gram = grams.pop(name)
        if gram.tokens:
            passed[name] = feedback(gram.matrix().div_(gram.tokens), DAMPING, ordered=True)
    scale_dtype = torch_dtype(request.scale_dtype)
    found = {}
    for scheme in levels:
        for group in groups:
            for name in group:
                rounded = _rounded(originals[name].float(), passed.get(group[0]), scheme, scale_dtype)
                replace_weight(block.linear(name), rounded)
        found[scheme.bits] = block.run_all(block.hidden)
    for name, weight in originals.items():
        replace_weight(block.linear(name), weight)
    return found


def _rounded(weight: Tensor, passed: Feedback | None, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
    """Round a weight with GPTQ; an expert that no token reached stays unchanged."""
    if passed is None:
        return weight
    grid = min_max_grid(weight, scheme, scale_dtype)
    return from_codes(round_with_feedback(weight, passed, grid, scheme).codes, grid, scheme)
