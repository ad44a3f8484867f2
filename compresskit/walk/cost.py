"""Cost of a walk: micro-batch size, peak memory and the head's share of the work.

The phases of a stage run one after the other, so the largest one sets the peak:

    capture   embedding + hidden states                                the walk's start
    block     block + hidden states + activations + second moments     edits of a block

Bytes exclude the memory that the process already uses, and the one tensor, in its stored dtype, that is being read from a
weight file.
"""

from __future__ import annotations

import math

from compresskit.machine.memory import free_memory_bytes
from compresskit.models.model import Model

MICRO_BATCH_BYTES = 1 << 25
"""Bound on the activations of the widest linear in one micro-batch (32 MiB)."""
KEPT_BYTES = 1 << 28
"""Bound on the inputs of a linear that are kept for the next run (kept.py): 256 MiB, 8,192 tokens of 8,192 features."""
FLOAT32_BYTES = 4
ACTIVATIONS = 5
"""Number of live tensors as large as the widest linear's inputs: two projections, the activation, the product, attention's."""
MOMENT_BYTES, SUMMED_BYTES = 16, 12
"""Bytes per entry of the second moments: in float32 with a float64 factor and its copy in float32; sums turned to float32."""
MEMORY_SHARE = 0.25
"""Of the free memory: hidden states that take more lie in mapped files, whose pages the system can write out and take back."""
COPIES_OF_A_GROUP, COPIES_OF_A_REFIT = 5, 2
"""Copies of the weights that are rounded together; of those that are refitted."""


def micro_batch_size(model: Model, length: int) -> int:
    """Number of `length`-token samples whose widest activations stay below `MICRO_BATCH_BYTES`; at least one."""
    widest = max((group.width for i in range(model.block_count) for group in model.ffn_groups(i)), default=0)
    bytes_per_sample = length * max(widest, model.hidden_size) * FLOAT32_BYTES
    return max(1, MICRO_BATCH_BYTES // bytes_per_sample)


def embedding_bytes(model: Model) -> int:
    """Bytes of the embedding (or the head) in float32."""
    return FLOAT32_BYTES * model.vocabulary * model.hidden_size


def hidden_bytes(model: Model, tokens: int) -> int:
    """Bytes of the hidden states of `tokens` tokens in float32."""
    return FLOAT32_BYTES * tokens * model.hidden_size


def lie_on_disk(model: Model, tokens: int) -> bool:
    """Whether the hidden states of so many tokens lie in a file of the work folder, where the walk is on the CPU."""
    free = free_memory_bytes()
    return free is not None and hidden_bytes(model, tokens) > MEMORY_SHARE * free


def held_bytes(model: Model, tokens: int) -> int:
    """Bytes of memory of a stream of hidden states in float32; none where it lies on disk."""
    return 0 if lie_on_disk(model, tokens) else hidden_bytes(model, tokens)


def scratch_bytes(model: Model, tokens: int) -> int:
    """Bytes on disk of what two walks keep there: inputs and outputs of a block, and as much for its attention."""
    return 2 * 4 * hidden_bytes(model, tokens) if lie_on_disk(model, tokens) else 0


def block_bytes(model: Model) -> int:
    """Bytes of the largest block's linears in float32."""
    sizes = [sum(math.prod(model.linear_shape(name)) for name in model.block_linears(i)) for i in range(model.block_count)]
    return FLOAT32_BYTES * max(sizes)


def _usual_block(model: Model) -> list[str]:
    """Linears of the first block that has any."""
    return next((names for i in range(model.block_count) if (names := model.block_linears(i))), [])


def largest_linear_bytes(model: Model) -> int:
    """Bytes of the first block's largest linear in float32."""
    return FLOAT32_BYTES * max((math.prod(model.linear_shape(name)) for name in _usual_block(model)), default=0)


def window_bytes(model: Model, length: int) -> int:
    """Bytes of the live activations of one window of `length` tokens."""
    return ACTIVATIONS * FLOAT32_BYTES * length * max(_widest(model), model.hidden_size)


def edit_bytes(model: Model, moments: bool) -> int:
    """Bytes to edit a linear: copies of its group and, if `moments`, the second moments of its inputs."""
    return COPIES_OF_A_GROUP * largest_linear_bytes(model) + (MOMENT_BYTES * _widest(model) ** 2 if moments else 0)


def refit_bytes(model: Model) -> int:
    """Bytes to refit a pruned linear: while its second moments are summed up, which later is more than their factor takes."""
    return COPIES_OF_A_REFIT * largest_linear_bytes(model) + SUMMED_BYTES * _widest(model) ** 2


def _widest(model: Model) -> int:
    """The most inputs that a linear of a block has."""
    return max((model.linear_shape(name)[1] for name in _usual_block(model)), default=0)


def walk_bytes(model: Model, tokens: tuple[int, int], edited: int) -> int:
    """Peak bytes of a walk. `tokens` is (windows, length); `edited` is the bytes of editing a block, 0 for no edit."""
    windows, length = tokens
    hidden = held_bytes(model, windows * length)
    activations = window_bytes(model, length) * micro_batch_size(model, length)
    kept = min(KEPT_BYTES, windows * window_bytes(model, length) // ACTIVATIONS) if edited else 0
    return max(embedding_bytes(model) + hidden, block_bytes(model) + 2 * hidden + activations + edited + kept)


def head_share(model: Model) -> float:
    """Ratio of the output head's work to that of all blocks."""
    head = model.vocabulary * model.hidden_size
    return head / max(1, sum(math.prod(model.linear_shape(name)) for name in model.linears))
