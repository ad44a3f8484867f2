"""Tokens per second and peak memory of the stock model, run by transformers' own classes.

Prefill reads a prompt in one pass, like `generate`: with a KV cache and logits of the last position only. Decode then
adds one token at a time with that cache, batch 1, greedily. A model and its reference alternate, A B A B, so that
a busy machine slows both. Speeds are medians over the rounds; ratios are medians of the per-round ratios.

Peak memory is parameters, buffers and the largest sum of live tensors during a prefill (activations and KV cache). On
CUDA the allocator reports that sum; elsewhere an extra untimed pass measures it (see memory.py).
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from compresskit.checkpoint.stock import next_logits
from compresskit.errors import RequestError
from compresskit.evaluation.memory import LiveTensors, available_bytes, weight_bytes
from compresskit.evaluation.scores import check_comparable, context_length
from compresskit.machine.device import Where
from compresskit.models.model import Model
from compresskit.models.ragged import load_stock

PROMPT_TOKENS = 512
DECODED_TOKENS = 64
ROUNDS = 5
MEMORY_MARGIN = 1.25
"""Required memory relative to the weights: activations, KV cache, one tensor during conversion."""


class Speed(BaseModel, frozen=True):
    """Speed of one model, compared with the reference if given; ratios above 1 mean the model is faster."""

    prompt_tokens: int
    decoded_tokens: int
    rounds: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    peak_memory_bytes: int
    prefill_speedup: float | None = None
    decode_speedup: float | None = None
    reference_prefill_tokens_per_second: float | None = None
    reference_decode_tokens_per_second: float | None = None
    reference_peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class Round:
    """Tokens per second of one prefill and its decoding."""

    prefill: float
    decode: float


def speed(
    model: Model,
    where: Where,
    reference: Model | None = None,
    rounds: int = ROUNDS,
) -> Speed:
    """Load the model (and the reference) whole and time them.

    Prompt and decoded tokens are fewer than `PROMPT_TOKENS` and `DECODED_TOKENS` if a context is shorter.

    Returns:
        Medians in tokens per second, peak memory in bytes, and the numbers of prompt and decoded tokens.

    Raises:
        RequestError: there is too little memory, or the vocabularies differ.
    """
    models = [model] if reference is None else [model, reference]
    check_comparable(models[0], models[-1])
    _check_memory(models, where.device, where.dtype)
    networks = [load_stock(model, where) for model in models]
    prompt, decoded = _prompt(models, where.device)
    peaks = [_peak_memory(network, prompt) for network in networks]  # also warms up the models
    timed = [[_round(network, prompt, decoded) for network in networks] for _ in range(rounds + 1)][1:]
    return _result(timed, peaks, prompt.shape[1], decoded)


def _check_memory(models: list[Model], device: torch.device, dtype: torch.dtype) -> None:
    """Check the memory before loading; packed weights count at the size to which transformers unpacks them."""
    needed = MEMORY_MARGIN * sum(model.parameters * dtype.itemsize for model in models)
    available = available_bytes(device)
    if available is not None and needed > available:
        raise RequestError(
            f"{models[0].checkpoint.folder}: --speed loads {len(models)} whole model(s), about {needed / 1e9:.1f} GB, and "
            f"{available / 1e9:.1f} GB are free on {device}; leave --speed out, or --against, or pass --dtype bfloat16"
        )


def _prompt(models: list[Model], device: torch.device) -> tuple[Tensor, int]:
    """Return (1, tokens) random tokens and the number to decode (at most an eighth), within the shortest context."""
    context = min(context_length(model) or PROMPT_TOKENS + DECODED_TOKENS for model in models)
    decoded = max(1, min(DECODED_TOKENS, context // 8))
    length = max(1, min(PROMPT_TOKENS, context - decoded))
    vocabulary = models[0].vocabulary
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(device), decoded


@torch.inference_mode()
def _peak_memory(network: Any, prompt: Tensor) -> int:
    """Bytes of this model's weights plus the peak of a prefill."""
    if prompt.device.type == "cuda":
        before = torch.cuda.memory_allocated(prompt.device)
        torch.cuda.reset_peak_memory_stats(prompt.device)
        network(prompt, use_cache=True, logits_to_keep=1)
        return weight_bytes(network) + torch.cuda.max_memory_allocated(prompt.device) - before
    with LiveTensors() as tensors:
        network(prompt, use_cache=True, logits_to_keep=1)
    return weight_bytes(network) + tensors.peak


@torch.inference_mode()
def _round(network: Any, prompt: Tensor, decoded: int) -> Round:
    start = _now(prompt.device)
    logits, cache = next_logits(network, prompt, None, logits_to_keep=1)
    prefilled = _now(prompt.device)
    for _ in range(decoded):
        logits, cache = next_logits(network, logits[:, -1:].argmax(dim=-1), cache, logits_to_keep=1)
    return Round(prompt.shape[1] / (prefilled - start), decoded / (_now(prompt.device) - prefilled))


def _now(device: torch.device) -> float:
    """Time in seconds, once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _result(timed: list[list[Round]], peaks: list[int], prompt: int, decoded: int) -> Speed:
    """`timed`: per round, the model and optionally the reference."""
    median = statistics.median
    ours = [each[0] for each in timed]
    compared: dict[str, Any] = {}
    if len(peaks) > 1:
        theirs = [each[1] for each in timed]
        compared = {
            "prefill_speedup": median(a.prefill / b.prefill for a, b in zip(ours, theirs, strict=True)),
            "decode_speedup": median(a.decode / b.decode for a, b in zip(ours, theirs, strict=True)),
            "reference_prefill_tokens_per_second": median(each.prefill for each in theirs),
            "reference_decode_tokens_per_second": median(each.decode for each in theirs),
            "reference_peak_memory_bytes": peaks[1],
        }
    return Speed(
        prompt_tokens=prompt,
        decoded_tokens=decoded,
        rounds=len(timed),
        prefill_tokens_per_second=median(each.prefill for each in ours),
        decode_tokens_per_second=median(each.decode for each in ours),
        peak_memory_bytes=peaks[0],
        **compared,
    )
