r"""Calibration text sampled from the model itself, at temperature 1, without truncating the distribution, cached.

Every window is one draw from the model's own distribution over texts: it begins with the start token and continues past
end-of-text tokens. Feeding the start token again after an end token worked worse: the demo model, whose start token opens a
chat turn, then repeats `<|im_start|>system\n<|im_end|>` to the end of the window. Left alone, it opens the next turn or
document by itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from compresskit.checkpoint.cache import writable_cache
from compresskit.checkpoint.small_files import LARGEST_CONFIG_BYTES, read_json
from compresskit.checkpoint.stock import next_logits
from compresskit.checkpoint.whole_files import write_whole_tensors
from compresskit.errors import NumericalError, RequestError
from compresskit.machine.device import Where
from compresskit.models.model import Model
from compresskit.models.ragged import load_stock

ALGORITHM_VERSION = 1
"""Increased when the same request would give other tokens."""
TEMPERATURE = 1.0
KEY_VALUE_CACHE_BYTES = 1 << 31
"""Bound on the KV cache of one batch (2 GiB); fixed, because the tokens depend on the batches."""
LOGITS_BYTES = 1 << 28
"""Bound on the logits and probabilities of one batch (256 MiB)."""
BYTES_PER_LOGIT = 16
"""Float32 logits, float64 probabilities and a temporary."""
TOKEN_BYTES = 8
HEADER_BYTES = 4096
"""More than the header and the checksum of a file of the cache."""
MEMORY_SHARE = 0.7
"""Share of free memory for the weights; the rest is for the KV cache and activations."""

Progress = Callable[[int, int], None]


class Sampling(NamedTuple):
    """Settings for sampling text from a model."""

    seed: int
    where: Where
    progress: Progress | None = None


def self_tokens(model: Model, shape: tuple[int, int], how: Sampling) -> tuple[Tensor, str]:
    """Sample tokens from the model, or read them from the cache. `shape`: (samples, sequence_length).

    Returns:
        (the tokens of this shape, int64 on the CPU; a description of the text, for reports).

    Raises:
        RequestError: the model does not fit into memory, or the cache is not writable.
        NumericalError: the model computes NaN or infinity.
    """
    start = start_token(model)
    description = f"text sampled from the model itself (temperature {TEMPERATURE:g}, from token {start})"
    key = _key(model, shape, how)
    file = writable_cache("calibration") / f"{key}.safetensors"
    tokens = _cached(file, key, shape, model.vocabulary)
    if tokens is None:
        _check_memory(model, how)
        network = load_stock(model, how.where)
        batch = batch_size(network.config, shape[1], how.where.dtype)
        tokens = torch.full(shape, start, dtype=torch.int64)
        sample(network, tokens, batch, torch.Generator().manual_seed(how.seed), how.progress)
        write_whole_tensors(file, {"tokens": tokens, "sha256": _checksum(tokens, key)})
    return tokens, description


def start_token(model: Model) -> int:
    """Start token of a text: bos_token_id, else eos_token_id, else 0; generation_config.json takes precedence."""
    configs = [model.checkpoint.config]
    generation = model.checkpoint.folder / "generation_config.json"
    if generation.is_file():
        configs.insert(0, read_json(generation, LARGEST_CONFIG_BYTES))
    for key in ("bos_token_id", "eos_token_id"):
        for config in configs:
            value = config.get(key)
            first = value[0] if isinstance(value, list) and value else value
            if type(first) is int and 0 <= first < model.vocabulary:
                return first
    return 0


def batch_size(config: Any, length: int, dtype: torch.dtype) -> int:
    """Number of windows sampled together, limited by the bounds on KV cache and logits."""
    text = config.get_text_config()
    all_heads: int = getattr(text, "num_attention_heads", None) or 1  # a state space model has none, and a small state
    heads: int = getattr(text, "num_key_value_heads", None) or all_heads
    head_size: int = getattr(text, "head_dim", None) or text.hidden_size // all_heads
    key_value_bytes: int = 2 * text.num_hidden_layers * heads * head_size * length * dtype.itemsize
    logits_bytes: int = text.vocab_size * BYTES_PER_LOGIT
    return max(1, min(KEY_VALUE_CACHE_BYTES // key_value_bytes, LOGITS_BYTES // logits_bytes))


@torch.inference_mode()
def sample(
    network: nn.Module, tokens: Tensor, batch: int, generator: torch.Generator, progress: Progress | None = None
) -> Tensor:
    """Ancestral sampling in place: tokens (samples, length) int64 on the CPU, with the first column given.

    `batch` is the number of samples computed at once. `generator` is on the CPU, so every device draws the same numbers.

    Returns:
        The same tokens, all columns filled.

    Raises:
        NumericalError: the model computes NaN or infinity.
    """
    device = next(network.parameters()).device
    samples, length = tokens.shape
    for first in range(0, samples, batch):
        rows = tokens[first : first + batch]
        cache = None
        for position in range(1, length):
            logits, cache = next_logits(network, rows[:, position - 1 : position].to(device), cache)
            rows[:, position] = pick(logits[:, -1], torch.rand(len(rows), 1, dtype=torch.float64, generator=generator))
            if progress:
                progress(first * length + (position + 1) * len(rows), tokens.numel())
    return tokens


def pick(logits: Tensor, uniform: Tensor) -> Tensor:
    """Sample one token per row by inverting the cumulative distribution.

    logits (rows, vocabulary) in any float dtype, uniform (rows, 1) float64 in [0, 1).

    Returns:
        (rows,) int64 on the CPU.

    Raises:
        NumericalError: a logit is NaN or infinity.
    """
    if not bool(logits.isfinite().all()):
        raise NumericalError("sampling calibration text: the model's logits hold NaN or infinity; use --dtype float32")
    # float64, because a float32 sum over a large vocabulary loses the rare tokens.
    cumulative = (logits.double() / TEMPERATURE).softmax(dim=-1).cumsum(dim=-1)
    threshold = uniform.to(cumulative.device) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1).cpu()


def _check_memory(model: Model, how: Sampling) -> None:
    needed = model.checkpoint.parameters * how.where.dtype.itemsize
    free = torch.cuda.mem_get_info(how.where.device)[0] if how.where.device.type == "cuda" else free_memory_bytes()
    if needed > MEMORY_SHARE * free:
        raise RequestError(
            f"{model.checkpoint.folder}: sampling its text loads {needed / 1e9:.1f} GB of weights, {free / 1e9:.1f} GB of "
            "memory are free; pass a text file: --calibration FILE"
        )


def free_memory_bytes() -> int:
    """Memory available without swapping; total memory if the system does not report it."""
    table = Path("/proc/meminfo")
    if table.is_file():
        for line in table.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _key(model: Model, shape: tuple[int, int], how: Sampling) -> str:
    # The configuration defines the model's function as much as the weights do; the folder's location does not.
    facts: list[Any] = [model.checkpoint.hashes, model.checkpoint.config, start_token(model), shape, how.seed]
    facts += [TEMPERATURE, str(how.where.dtype), ALGORITHM_VERSION, KEY_VALUE_CACHE_BYTES, LOGITS_BYTES]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _cached(file: Path, key: str, shape: tuple[int, int], vocabulary: int) -> Tensor | None:
    """Read the tokens of an earlier call, sampled for the same key.

    Returns:
        The tokens; None if there are none, or the file is damaged or was another key's, so that they are sampled again.
    """
    if not file.is_file() or file.stat().st_size > math.prod(shape) * TOKEN_BYTES + HEADER_BYTES:
        return None
    try:
        stored: dict[str, Tensor] = load_file(file)
    except Exception:  # safetensors raises its own kind, torch others
        return None
    tokens, checksum = stored.get("tokens"), stored.get("sha256")
    if tokens is None or checksum is None or tuple(tokens.shape) != shape:
        return None
    if tokens.dtype != torch.int64 or checksum.dtype != torch.uint8:
        return None
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        return None
    return tokens if torch.equal(checksum, _checksum(tokens, key)) else None


def _checksum(tokens: Tensor, key: str) -> Tensor:
    """SHA-256 of the key and the tokens, so that a file under another key's name is not taken for that one's."""
    digest = hashlib.sha256(key.encode() + tokens.numpy().tobytes()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)
