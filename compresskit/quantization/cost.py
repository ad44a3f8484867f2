"""Passes, memory and scratch files of `quantize`, from shapes alone."""

from __future__ import annotations

import math

from compresskit.evaluation.request import scoring_bytes
from compresskit.job import HELD_BACK
from compresskit.models.model import Model
from compresskit.quantization.block_method import BlockMethod
from compresskit.quantization.method import QuantizeMethod
from compresskit.walk.cost import (
    FLOAT32_BYTES,
    block_bytes,
    edit_bytes,
    embedding_bytes,
    head_share,
    hidden_bytes,
    largest_linear_bytes,
    walk_bytes,
    window_bytes,
)

PASSES, PASSES_TRAINING, PASSES_GUIDE = 2.7, 4.0, 3.0
"""GPTQ on 2.6, measured; a training pass is a forward, a backward of twice its work, and the rounding of the weights; a guide
takes a forward, another with gradients, and their way back to the inputs."""
TRAINED_COPIES = 6
"""Of a block in training: gradient, target, offset, its gradient, and two of AdamW."""
GRAPH_COPIES = 8
"""Of one linear, in the graph of its rounding."""
LOGIT_COPIES = 6
"""Of the logits of a window, gradients included, where labels are drawn from them."""
SUM_BYTES = 8
"""Of an entry of second moments while they are summed, in float64."""
EXPONENTS = 20
"""That `--scaling` tries, each with a product of the rounding's errors with the second moments (awq.py)."""
GUIDE_TOKENS = 1 << 14
"""Tokens whose inputs of all blocks lie on the disk at the same time, for a guide."""


def guide_windows(length: int) -> int:
    """Windows of so many tokens whose inputs of all blocks lie on the disk at the same time, for a guide."""
    return max(1, GUIDE_TOKENS // length)


def passes(method: QuantizeMethod, model: Model, windows: int, length: int) -> float:
    """Forward passes of a window, sampling left out."""
    scaling = windows + _scaling_tokens(model) / length if method.scales_inputs else 0.0
    closing = 2 * HELD_BACK * (1 + head_share(model))
    if isinstance(method, BlockMethod):
        return windows * (PASSES + PASSES_TRAINING * method.training_epochs) + scaling + closing
    guiding = windows * PASSES_GUIDE * (1 + head_share(model)) if method.guide_rows else 0.0
    return (windows * PASSES if method.needs_text else 0.0) + guiding + scaling + closing


def _scaling_tokens(model: Model) -> float:
    """Tokens whose forward pass takes as long as the products of `--scaling`."""
    shapes = [model.linear_shape(name) for name in model.linears]
    return EXPONENTS * sum(rows * columns**2 for rows, columns in shapes) / max(1, sum(map(math.prod, shapes)))


def _scaling_bytes(model: Model) -> int:
    """Bytes of the second moments of all inputs of a block, which `--scaling` collects in one pass."""
    most = 0
    for index in range(model.block_count):
        firsts = [group[0] for position in model.linear_sequence(index) for group in position]
        most = max(most, sum(model.linear_shape(name)[1] ** 2 for name in firsts))
    return SUM_BYTES * most


def peak_bytes(method: QuantizeMethod, model: Model, samples: int, length: int) -> int:
    """Peak bytes: of the walk, of a guide's backward pass, or of the final KL divergence."""
    windows = samples if method.needs_text else 0
    edited = edit_bytes(model, method.needs_text) + _row_moments(model, method.guide_rows)
    if method.scales_inputs:
        edited = max(edited, edit_bytes(model, False) + _scaling_bytes(model))
    walked = walk_bytes(model, (windows, length), edited)
    if isinstance(method, BlockMethod):
        hidden, block = hidden_bytes(model, windows * length), block_bytes(model)
        trained = block + TRAINED_COPIES * block + GRAPH_COPIES * largest_linear_bytes(model) + window_bytes(model, length)
        walked = max(embedding_bytes(model) + 2 * hidden, 3 * hidden + max(trained, 3 * block + edited))
    backward = _backward_bytes(model, length) if method.guide_rows else 0
    return max(walked, backward, scoring_bytes(model, HELD_BACK * length))


def _row_moments(model: Model, groups: int) -> int:
    """Bytes of the second moments of a guide beyond those of one matrix an input: one for each linear and group of its rows."""
    most = 0
    for index in range(model.block_count if groups else 0):
        for position in model.linear_sequence(index):
            matrices = [(groups * len(names), model.linear_shape(names[0])[1]) for names in position]
            most = max(most, sum(count * columns**2 for count, columns in matrices) - max(columns**2 for _, columns in matrices))
    return SUM_BYTES * most


def _backward_bytes(model: Model, length: int) -> int:
    """Bytes of a guide's backward pass: the head and a window's logits, or a block with a window's activations."""
    hidden = 2 * hidden_bytes(model, guide_windows(length) * length)
    head = embedding_bytes(model) + LOGIT_COPIES * FLOAT32_BYTES * length * model.vocabulary
    return hidden + max(head, block_bytes(model) + 2 * window_bytes(model, length))


def guide_scratch_bytes(method: QuantizeMethod, model: Model, samples: int, length: int) -> int:
    """Bytes of a guide's scratch files: inputs of all blocks of some windows, and the weights of the tokens of all windows."""
    if not method.guide_rows:
        return 0
    inputs = model.block_count * hidden_bytes(model, min(samples, guide_windows(length)) * length)
    return inputs + FLOAT32_BYTES * samples * length * method.guide_rows * len(model.linears)
