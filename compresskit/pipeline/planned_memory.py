"""The memory that a step would need at its peak: the sum of the large tensors that its stage holds at once.

Phases of a stage come one after the other, so the largest counts:

    capture   embedding + hidden states                                the walk's start
    block     block + hidden states + activations + second moments     edits of a block
    training  what ApiQ holds of a block in training, or fine-tuning of the whole model
    scoring   two embeddings + logits of some positions                the sanity figure, evaluate

All in bytes, on top of the process as it is; weight files are read a tensor at a time and do not count.
"""

from __future__ import annotations

import math

from compresskit.compensate.contract import OUTPUT_WEIGHT_WINDOWS, CompensateMethod
from compresskit.model import Model
from compresskit.recipe.steps import Step
from compresskit.recover.contract import Loss, RecoverOptions
from compresskit.recover.schedule import MICRO_BATCH_TOKENS
from compresskit.stages import BlockMethod, PruneMethod

FLOAT32_BYTES = 4
ACTIVATIONS = 5
"""Tensors as large as the inputs of the widest linear that are alive at once: two projections, the activation, the product,
attention's."""
SCORING_CHUNKS = 6
"""Logits of two models and what is made of them, each as large as evaluation bounds it."""
MOMENT_BYTES = 24
"""A second moment in float32, its reordered copy, and two matrices of float64 while it is factorised."""
COPIES_OF_A_GROUP = 5
"""Of the weights that are rounded or refitted together."""
TRAINED_COPIES = 6
"""Of a block in ApiQ's training: gradient, target, offset, its gradient, and two of AdamW."""
GRAPH_COPIES = 8
"""Of one linear, in the graph of its rounding."""
LOGIT_COPIES = 6
"""Of the logits of a window, gradients included, where a loss is differentiated step by step."""
LEARNED_LOGIT_COPIES: dict[Loss, int] = {"response": 4, "distill": 3}
"""Of the logits of a micro-batch in fine-tuning, gradients included."""
FINE_TUNING_BYTES = 6
"""A weight in float32 and its copy in bfloat16."""
FULL_UPDATE_BYTES = 12
"""Of a weight that is itself trained: its gradient, and two of AdamW."""
LIBRARIES_BYTES = 150 << 20
"""What peft and accelerate take."""
COMPILED_BYTES = 700 << 20
"""What oneDNN keeps of products that it compiled for the lengths it met, 1,024 of them."""
LEFT_BY_FINE_TUNING = 480 << 20
"""What stays in the process for the steps after it: those libraries, and holes in the heap."""


def peak_bytes(step: Step, model: Model, windows: int, length: int) -> int:
    """Bytes at the peak of a step over `windows` windows of `length` tokens, without the process as it is."""
    if isinstance(step.options, RecoverOptions):
        return max(_fine_tuning(model, step.options), _walking(step, model, windows, length), _scoring(model, windows * length))
    scored = 0 if isinstance(step.method, PruneMethod) else _scoring(model, windows * length if not step.writes_model else 0)
    weighed = isinstance(step.method, CompensateMethod) and step.method.weighs_outputs
    head = _head_gradient(model, min(windows, OUTPUT_WEIGHT_WINDOWS), length) if weighed else 0
    return max(_walking(step, model, windows, length), scored, head)


def _head_gradient(model: Model, windows: int, length: int) -> int:
    """Last hidden states and their gradients, the head, and what a backward pass needs of one window's logits."""
    logits = LOGIT_COPIES * length * int(model.checkpoint.config["vocab_size"]) * FLOAT32_BYTES
    return 2 * FLOAT32_BYTES * windows * length * model.hidden_size + _embedding(model) + logits


def _walking(step: Step, model: Model, windows: int, length: int) -> int:
    """The largest phase of a walk that looks at, and perhaps edits, block after block."""
    from compresskit.walk import micro_batch_size

    shapes = [model.linear_shape(name) for name in block_linears(model, 0)]
    sizes = [sum(math.prod(model.linear_shape(name)) for name in block_linears(model, i)) for i in range(model.block_count)]
    block = FLOAT32_BYTES * max(sizes)
    hidden = FLOAT32_BYTES * windows * length * model.hidden_size
    widest = max(columns for _, columns in shapes)
    window = FLOAT32_BYTES * length * max(widest, model.hidden_size)
    activations = ACTIVATIONS * window * micro_batch_size(model, length)
    largest = FLOAT32_BYTES * max(map(math.prod, shapes))
    moments = MOMENT_BYTES * widest**2 if getattr(step.method, "needs_activations", True) else 0
    edited = moments + COPIES_OF_A_GROUP * largest if step.writes_model else 0
    capture = _embedding(model) + hidden
    if not isinstance(step.method, BlockMethod):
        return max(capture, block + 2 * hidden + activations + edited)
    trained = block + TRAINED_COPIES * block + GRAPH_COPIES * largest + ACTIVATIONS * window
    started = 3 * block + edited
    return max(capture + hidden, 3 * hidden + max(trained, started))


def _fine_tuning(model: Model, options: RecoverOptions) -> int:
    """The whole model, what a full update adds to it, what a backward pass needs of a micro-batch, and its logits."""
    numbers = sum(sum(model.linear_shape(name)) for name in model.linears)
    vocabulary = int(model.checkpoint.config["vocab_size"])
    tokens = min(MICRO_BATCH_TOKENS, options.batch_size * options.sequence_length)
    logits = LEARNED_LOGIT_COPIES[options.loss] * tokens * vocabulary * FLOAT32_BYTES
    trained = sum(math.prod(model.linear_shape(name)) for name in model.linears) if options.update == "full" else 0
    weights = FINE_TUNING_BYTES * model.parameters + FULL_UPDATE_BYTES * trained
    return LIBRARIES_BYTES + COMPILED_BYTES + weights + tokens * numbers * FLOAT32_BYTES + logits


def _scoring(model: Model, tokens: int) -> int:
    """Two models' last hidden states, embeddings and logits."""
    from compresskit.evaluate.language_modelling import CHUNK_BYTES

    return 2 * (FLOAT32_BYTES * tokens * model.hidden_size + _embedding(model)) + SCORING_CHUNKS * CHUNK_BYTES


def _embedding(model: Model) -> int:
    return FLOAT32_BYTES * int(model.checkpoint.config["vocab_size"]) * model.hidden_size


def block_linears(model: Model, index: int) -> list[str]:
    """The linears of a block, by plain name."""
    return [name for stage in model.linear_stages(index) for group in stage for name in group]
