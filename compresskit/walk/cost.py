"""What a walk costs: samples in a micro-batch, bytes at the peak, the head's share of the work. Loads no torch.

Phases of a stage come one after the other, so the largest counts:

    capture   embedding + hidden states                                the walk's start
    block     block + hidden states + activations + second moments     edits of a block

Bytes come on top of the process as it is; weight files are read a tensor at a time and do not count.
"""

from __future__ import annotations

import math

from compresskit.models.model import Model

MICRO_BATCH_BYTES = 1 << 25
"""Bound on the activations of the widest linear in one micro-batch (32 MiB)."""
FLOAT32_BYTES = 4
ACTIVATIONS = 5
"""Tensors as large as the inputs of the widest linear that are alive at once: two projections, the activation, the product,
attention's."""
MOMENT_BYTES = 24
"""A second moment in float32, its reordered copy, and two matrices of float64 while it is factorised."""
COPIES_OF_A_GROUP = 5
"""Of the weights that are rounded or refitted together."""


def micro_batch_size(model: Model, length: int) -> int:
    """Samples of `length` tokens whose activations in the widest linear stay below `MICRO_BATCH_BYTES`; at least one."""
    widest = max(group.width for i in range(model.block_count) for group in model.ffn_groups(i))
    bytes_per_sample = length * max(widest, model.hidden_size) * FLOAT32_BYTES
    return max(1, MICRO_BATCH_BYTES // bytes_per_sample)


def embedding_bytes(model: Model) -> int:
    """The embedding, or the head, in float32."""
    return FLOAT32_BYTES * int(model.checkpoint.config["vocab_size"]) * model.hidden_size


def hidden_bytes(model: Model, tokens: int) -> int:
    """The hidden states of so many tokens in float32."""
    return FLOAT32_BYTES * tokens * model.hidden_size


def block_bytes(model: Model) -> int:
    """The linears of the largest block in float32."""
    sizes = [sum(math.prod(model.linear_shape(name)) for name in model.block_linears(i)) for i in range(model.block_count)]
    return FLOAT32_BYTES * max(sizes)


def largest_linear_bytes(model: Model) -> int:
    """The largest linear of the first block in float32."""
    return FLOAT32_BYTES * max(math.prod(model.linear_shape(name)) for name in model.block_linears(0))


def window_bytes(model: Model, length: int) -> int:
    """The activations of one window of `length` tokens, those that are alive at once."""
    widest = max(model.linear_shape(name)[1] for name in model.block_linears(0))
    return ACTIVATIONS * FLOAT32_BYTES * length * max(widest, model.hidden_size)


def edit_bytes(model: Model, moments: bool) -> int:
    """What the edit of a linear takes: copies of its group and, where asked for, the second moments of its inputs."""
    widest = max(model.linear_shape(name)[1] for name in model.block_linears(0))
    return COPIES_OF_A_GROUP * largest_linear_bytes(model) + (MOMENT_BYTES * widest**2 if moments else 0)


def walk_bytes(model: Model, tokens: tuple[int, int], edited: int) -> int:
    """The peak of a walk. `tokens`: (windows, their length); `edited`: bytes of the edit of a block, 0 for none."""
    windows, length = tokens
    hidden = hidden_bytes(model, windows * length)
    activations = window_bytes(model, length) * micro_batch_size(model, length)
    return max(embedding_bytes(model) + hidden, block_bytes(model) + 2 * hidden + activations + edited)


def head_share(model: Model) -> float:
    """The work of the output head over that of all blocks."""
    head = int(model.checkpoint.config["vocab_size"]) * model.hidden_size
    return head / sum(math.prod(model.linear_shape(name)) for name in model.linears)
