"""Calibration windows: equal-length token sequences, drawn from a text by the seed or sampled from the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.calibration.sampling import Sampling, self_tokens
from compresskit.calibration.sources import SelfSource, TextRequest, TextSource, check, parse, read_text, shares
from compresskit.calibration.tokens import encode
from compresskit.errors import CalibrationError
from compresskit.machine.device import Where
from compresskit.models.model import Model
from compresskit.models.tokenizer import check_vocabulary

CONTEXT_KEYS = ("max_position_embeddings", "n_positions")
"""Keys of config.json that limit the sequence length."""


@dataclass(frozen=True)
class Calibration:
    """Token windows and their origin."""

    tokens: Tensor
    """(samples, sequence_length) int64, without padding."""
    description: str
    """Description of the text."""
    digest: str
    """SHA-256 of the tokens, in hexadecimal."""


def calibrate(
    request: TextRequest, model: Model, where: Where, progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Build the token windows of a text; the same request gives the same tokens.

    `where` is the device on which the model samples its own text. `progress` is called with (tokens done, total tokens).

    Returns:
        The tokens (samples, sequence_length) int64 on the CPU, a description of the text, and their SHA-256.

    Raises:
        CalibrationError: the text is unusable or too short.
        RequestError: `self` is requested for a model that cannot be sampled here.
        NetworkError: a Hub data set is unreachable.
    """
    spec, samples, sequence_length, seed = request
    check(spec, samples, sequence_length)
    _check_context(model, sequence_length)
    sources = parse(spec)
    sized = list(zip(sources, shares(samples, len(sources)), strict=True))
    how = Sampling(seed, where, progress)
    found: dict[int, tuple[Tensor, str]] = {}
    # Texts first: they may be too short, and sampling takes minutes.
    for index, (source, share) in sorted(enumerate(sized), key=lambda item: isinstance(item[1][0], SelfSource)):
        if isinstance(source, SelfSource):
            found[index] = self_tokens(model, (share, sequence_length), how)
        else:
            found[index] = _text_tokens(source, model, (share, sequence_length), seed, where.trust_remote_code)
    parts = [found[index] for index in range(len(sources))]
    windows = torch.cat([tokens for tokens, _ in parts])
    description = "; ".join(f"{len(tokens)} windows of {text}" for tokens, text in parts)
    check_vocabulary(model, int(windows.max()))
    return Calibration(windows, f"{description}; {sequence_length} tokens each, seed {seed}", digest(windows))


def digest(tokens: Tensor) -> str:
    """Hexadecimal SHA-256 of the shape and the tokens as little-endian 64-bit integers; tokens on the CPU."""
    header = repr(tuple(tokens.shape)).encode()
    return hashlib.sha256(header + tokens.numpy().astype("<i8").tobytes()).hexdigest()


def _check_context(model: Model, sequence_length: int) -> None:
    for key in CONTEXT_KEYS:
        longest = model.checkpoint.config.get(key)
        if type(longest) is int and sequence_length > longest:
            raise CalibrationError(
                f"--sequence-length {sequence_length}: the model reads at most {longest} tokens ({key}); lower it"
            )


def _text_tokens(
    source: TextSource, model: Model, shape: tuple[int, int], seed: int, trust_remote_code: bool
) -> tuple[Tensor, str]:
    text, description = read_text(source, seed)
    ids = encode(model.checkpoint.folder, text, special_tokens=False, trust_remote_code=trust_remote_code)
    return draw(torch.tensor(ids, dtype=torch.int64), *shape, seed, description), description


def draw(ids: Tensor, samples: int, sequence_length: int, seed: int, description: str) -> Tensor:
    """Cut ids (tokens,) into consecutive windows and draw from them without replacement.

    `description` names the text in errors.

    Returns:
        (samples, sequence_length), like ids, in drawing order.

    Raises:
        CalibrationError: there are fewer windows than samples.
    """
    count = len(ids) // sequence_length
    if count < samples:
        remedy = (
            f"--samples {count} or fewer would fit, or give more text" if count else "lower --sequence-length or give more text"
        )
        raise CalibrationError(
            f"{description}: {len(ids):,} tokens make {count} windows of {sequence_length}, {samples} are needed; {remedy}"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    return ids[: count * sequence_length].view(count, sequence_length)[order].clone()
