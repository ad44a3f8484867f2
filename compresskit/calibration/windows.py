"""Calibration windows: equal-length token sequences, drawn from a text by the seed or sampled from the model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from compresskit.calibration.image_rows import Share, check_request, shares_of, takes_images
from compresskit.calibration.images import image_windows, images_digest
from compresskit.calibration.sampling import Sampling, self_tokens
from compresskit.calibration.sources import FileSource, SelfSource, TextRequest, read_text
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
    """SHA-256 of the tokens and the images, in hexadecimal."""
    images: Mapping[bytes, dict[str, Tensor]] = field(default_factory=dict)
    """What the model is given beside the tokens of windows with images, by the bytes of these tokens."""


def calibrate(
    request: TextRequest, model: Model, where: Where, progress: Callable[[int, int], None] | None = None
) -> Calibration:
    """Build the token windows of a text; the same request gives the same tokens.

    `where` is the device on which the model samples its own text. `progress` is called with (tokens done, total tokens).

    Returns:
        The tokens (samples, sequence_length) int64 on the CPU, a description of the text, their SHA-256, and the images.

    Raises:
        CalibrationError: the text is unusable or too short.
        RequestError: `self` is requested for a model that cannot be sampled here.
        NetworkError: a Hub data set is unreachable.
    """
    sequence_length, seed = request.sequence_length, request.seed
    check_request(request, model)
    _check_context(model, sequence_length)
    sized, images = shares_of(request), dict[bytes, dict[str, Tensor]]()
    how = Sampling(seed, where, progress)
    found: dict[int, tuple[Tensor, str]] = {}
    # Texts first: they may be too short, and sampling takes minutes.
    for index, share in sorted(enumerate(sized), key=lambda item: isinstance(item[1].source, SelfSource)):
        if isinstance(share.source, SelfSource):
            found[index] = self_tokens(model, (share.windows, sequence_length), how)
        elif isinstance(share.source, FileSource) and takes_images(share):
            found[index], more = image_windows(share, model, sequence_length, seed, where.trust_remote_code)
            images |= more
        else:
            found[index] = _text_tokens(share, model, sequence_length, seed, where.trust_remote_code)
    parts = [found[index] for index in range(len(sized))]
    windows = torch.cat([tokens for tokens, _ in parts])
    description = "; ".join(f"{len(tokens)} windows of {text}" for tokens, text in parts)
    check_vocabulary(model, int(windows.max()))
    return Calibration(
        windows, f"{description}; {sequence_length} tokens each, seed {seed}", images_digest(digest(windows), images), images
    )


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


def _text_tokens(share: Share, model: Model, length: int, seed: int, trust_remote_code: bool) -> tuple[Tensor, str]:
    assert not isinstance(share.source, SelfSource)
    text, description = read_text(share.source, seed)
    ids = encode(model.checkpoint.folder, text, special_tokens=False, trust_remote_code=trust_remote_code)
    return draw(torch.tensor(ids, dtype=torch.int64), share.windows, length, seed, description), description


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
