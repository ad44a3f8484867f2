"""Cost of a fine-tuning: its text, its forward passes and its memory, from shapes alone."""

from __future__ import annotations

import math
from pathlib import Path

from compresskit.models.model import Model
from compresskit.recovery.data.instructions import read_instructions
from compresskit.recovery.options import Loss, RecoverOptions
from compresskit.walk.cost import (
    FLOAT32_BYTES,
    block_bytes,
    embedding_bytes,
    held_bytes,
    largest_linear_bytes,
)

MICRO_BATCH_TOKENS = 1024
"""Bound on the tokens, padding included, of a forward and backward pass; in bfloat16 the logits of so many take 100 MB at 49,152
words. Twice as many are 4% faster on SmolLM2-135M and take 1.2 GB more."""
PASSES_TRAINING = 3.0
"""A forward, and a backward of twice its work."""
BOTH_STREAMS = 2.0
"""Forward passes with which spans of blocks carry the hidden states of the original and of the trained model on."""
BYTES_PER_TOKEN = 4
"""Of English text."""
LEARNED_LOGIT_COPIES: dict[Loss, int] = {"response": 4, "distill": 3}
"""Of the logits of a micro-batch in fine-tuning, gradients included."""
FINE_TUNING_BYTES = 6
"""A weight in float32 and its copy in bfloat16."""
FULL_UPDATE_BYTES = 12
"""Of a weight that is itself trained: its gradient, and two of AdamW."""
SPAN_WEIGHT_BYTES = 5
"""Of a weight in a span of blocks: its code, and what it stands for in float32."""
SPAN_CODE_BYTES = 20
"""Of a weight in a span whose codes are trained: the latent, its gradient, two of AdamW, and what it stands for."""
LIBRARIES_BYTES = 150 << 20
"""What peft and accelerate take."""
COMPILED_BYTES = 700 << 20
"""What oneDNN keeps of products that it compiled for the lengths it met, 1,024 of them."""


def instruction_size(options: RecoverOptions) -> tuple[int, float]:
    """(samples of the data files, their mean length in windows); a file that is not there yet counts nothing."""
    paths = [path for path in (Path(each).expanduser() for each in options.data) if path.is_file()]
    texts = [sample.text.encode() for sample in read_instructions(paths).samples]
    return len(texts), min(1.0, sum(map(len, texts)) / max(1, len(texts)) / BYTES_PER_TOKEN / options.sequence_length)


def streamed_tokens(options: RecoverOptions) -> int:
    """Tokens whose hidden states both streams hold where spans of blocks are trained: at most those of the pool and all texts."""
    samples, length = instruction_size(options)
    windows = min(options.pool or samples, samples) * length + options.self_samples + options.text_samples
    return math.ceil(windows * options.sequence_length)


def training_bytes(model: Model, original: Model | None, options: RecoverOptions) -> int:
    """Peak bytes of the fine-tuning; `original` may be left out where only shapes are known."""
    if options.blocks_at_once:
        return _spans_bytes(model, original or model, options)
    return _network_bytes(model, options)


def _network_bytes(model: Model, options: RecoverOptions) -> int:
    """The whole model, what a full update adds to it, what a backward pass needs of a micro-batch, and its logits."""
    numbers = sum(sum(model.linear_shape(name)) for name in model.linears)
    tokens = min(MICRO_BATCH_TOKENS, options.batch_size * options.sequence_length)
    logits = LEARNED_LOGIT_COPIES[options.learned] * tokens * model.vocabulary * FLOAT32_BYTES
    whole = options.update == "full" or (options.update == "grid" and options.train == "all")
    trained = sum(math.prod(model.linear_shape(name)) for name in model.linears) if whole else 0
    weights = FINE_TUNING_BYTES * model.parameters + FULL_UPDATE_BYTES * trained
    return LIBRARIES_BYTES + COMPILED_BYTES + weights + tokens * numbers * FLOAT32_BYTES + logits


def _spans_bytes(model: Model, original: Model, options: RecoverOptions) -> int:
    """A span of blocks, what its training adds to it, a sample's activations, both streams, an original block, and logits."""
    size, tokens, length = options.blocks_at_once, streamed_tokens(options), options.sequence_length
    each = SPAN_CODE_BYTES if options.train == "all" else SPAN_WEIGHT_BYTES
    weights = each * size * block_bytes(model) // FLOAT32_BYTES + largest_linear_bytes(model)
    numbers = max(sum(sum(model.linear_shape(name)) for name in model.block_linears(i)) for i in range(model.block_count))
    streams = 2 * held_bytes(model, tokens)
    logits = LEARNED_LOGIT_COPIES["distill"] * length * model.vocabulary * FLOAT32_BYTES
    others = block_bytes(original) + embedding_bytes(model) + size * length * numbers * FLOAT32_BYTES
    return LIBRARIES_BYTES + COMPILED_BYTES + weights + streams + logits + others
