"""Degradation of a compressed model on a sample, as in PASER (arXiv 2502.12594), teacher-forced.

    JSD(P, Q) = KL(P || M) / 2 + KL(Q || M) / 2,   M = (P + Q) / 2                        in nats, 0 to ln 2
    degradation(sample) = mean over response tokens of JSD(P_original(. | x, y_<t), P_compressed(. | x, y_<t))

The released code also scores the prompt and sums over tokens, which rewards length; this module follows the paper.

In addition to the paper, the loss increase is measured: the mean over the same tokens of log P_original(y_t) -
log P_compressed(y_t), in nats. The divergence is bounded and covers the whole vocabulary; the loss increase shows how much
less likely the answer itself became.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from compresskit import distributed
from compresskit.checkpoint.whole_files import write_whole_tensors
from compresskit.errors import NumericalError
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.forward import chunks, mean_hidden, predictions, token_losses, walked
from compresskit.walk.walk import Walk


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of two sets of logits (rows, vocabulary) -> (rows,)."""
    log_p, log_q = first.log_softmax(dim=-1), second.log_softmax(dim=-1)
    # This form gives exactly 0 for equal inputs: log1p(exp(-0)) equals log 2 to the last bit.
    log_m = torch.maximum(log_p, log_q) + ((-(log_p - log_q).abs()).exp().log1p() - math.log(2))
    divergence = 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(dim=-1)
    # Rounding of the sum over a large vocabulary can exceed the bounds.
    return divergence.clamp(0, math.log(2))


def degradations(
    original: Walk,
    compressed: Walk,
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> tuple[list[float], list[float], Tensor]:
    """Measure the degradation on every sample; neither model is ever whole in memory.

    Each finished chunk of samples is saved in `folder` and reused by later runs with the same models and samples.

    Returns:
        (divergences by sample, in nats, from 0 to ln 2; loss increases, in nats per token, negative if the compressed model is
        better; the compressed model's states as in `embeddings.own_states`, from the same pass).

    Raises:
        NumericalError: a prediction is NaN.
    """
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    lost = torch.zeros(2, len(samples), dtype=torch.float64)
    states = torch.empty(len(samples), compressed.model.hidden_size)
    done = 0
    for number, chunk in enumerate(chunks(samples, original.model.hidden_size)):
        file = folder / f"{number:05}.safetensors" if folder else None
        lost[:, chunk], states[chunk] = _kept(file, original, compressed, [samples[i] for i in chunk])
        done += len(chunk)
        if progress:
            progress(done, len(samples))
    divergences, losses = lost.tolist()
    return divergences, losses, states


def _kept(file: Path | None, original: Walk, compressed: Walk, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Result of `_measured`, read from the file if it exists."""
    if file and distributed.from_first(file.is_file):
        found = load_file(file)
    else:
        found = dict(zip(("lost", "states"), _measured(original, compressed, samples), strict=True))
        if file and distributed.is_first():
            write_whole_tensors(file, found)
    return found["lost"], found["states"]


def _measured(original: Walk, compressed: Walk, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Return ((2, samples) float64, divergence and loss increase; (samples, hidden) float32, mean state) of each sample."""
    both = walked([original, compressed], samples)
    sums = torch.zeros(2, len(samples), dtype=torch.float64)
    for rows in predictions(both, samples):
        before, after = (token_losses(logits, rows.targets) for logits in rows.logits)
        each = torch.stack([jensen_shannon(*rows.logits), after - before])
        sums.index_add_(1, rows.owners, each.double().cpu())
    distributed.total(sums)
    if not bool(sums.isfinite().all()):
        raise NumericalError(f"{compressed.model.checkpoint.folder}: its predictions hold NaN; use --dtype float32")
    counts = torch.tensor([max(1, sample.response_tokens) for sample in samples])
    return sums / counts, mean_hidden(both[1], samples)
