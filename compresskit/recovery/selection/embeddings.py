"""Vectors of samples: the compressed model's mean-pooled hidden states, or those of an encoder in a folder.

The default, the model's own states, needs no network and no second model, and shows which samples the compressed model
treats as similar. The common mean, which dominates the vectors, is subtracted; all vectors have length 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from compresskit.checkpoint.small_files import first_line
from compresskit.errors import RequestError
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.forward import chunks, mean_hidden, walked
from compresskit.walk.walk import Walk

ENCODER_BATCH = 32
ENCODER_TOKENS = 256
"""Tokens per sample for an encoder; common sentence encoders were trained on at most 256 or 512."""

Progress = Callable[[int, int], None]


def centred(vectors: Tensor) -> Tensor:
    """Subtract the mean and normalise to length 1, (samples, width)."""
    moved = vectors - vectors.mean(dim=0)
    lengths: Tensor = torch.linalg.vector_norm(moved, dim=1, keepdim=True)
    return moved / lengths.clamp(min=torch.finfo(moved.dtype).tiny)


def own_states(walk: Walk, samples: Sequence[Sample], progress: Progress | None = None) -> Tensor:
    """Input of `centred`: (samples, hidden) float32, the mean of the last block's output over a sample's tokens."""
    found = torch.empty(len(samples), walk.model.hidden_size)
    done = 0
    for chunk in chunks(samples, walk.model.hidden_size):
        members = [samples[i] for i in chunk]
        found[chunk] = mean_hidden(walked([walk], members)[0], members)
        done += len(chunk)
        if progress:
            progress(done, len(samples))
    return found


@torch.no_grad()
def encoder_embeddings(folder: Path, texts: Sequence[str], progress: Progress | None = None) -> Tensor:
    """Mean-pooled states of an encoder in a sentence-transformers folder.

    Returns:
        (texts, width) float32, centred and of length 1.

    Raises:
        RequestError: transformers finds no encoder in the folder.
    """
    from transformers import AutoModel, AutoTokenizer

    from compresskit.checkpoint.stock import quiet, stock_config

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            network = AutoModel.from_pretrained(
                folder, config=stock_config(folder), local_files_only=True, trust_remote_code=False, use_safetensors=True
            ).eval()
    except Exception as error:  # transformers and tokenizers raise errors of every kind
        raise RequestError(f"--embedder {folder}: not an encoder that transformers opens ({first_line(error)})") from error
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: list[Tensor] = [torch.empty(0)] * len(texts)
    for start in range(0, len(order), ENCODER_BATCH):
        batch = order[start : start + ENCODER_BATCH]
        read = tokenizer([texts[i] for i in batch], padding=True, truncation=True, max_length=ENCODER_TOKENS, return_tensors="pt")
        mask = read["attention_mask"][:, :, None].float()
        pooled = (network(**read).last_hidden_state * mask).sum(dim=1) / mask.sum(dim=1)
        for index, vector in zip(batch, pooled, strict=True):
            found[index] = vector
        if progress:
            progress(start + len(batch), len(texts))
    return centred(torch.stack(found))
