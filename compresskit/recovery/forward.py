"""Run samples of different lengths through the walk: chunks of similar length, padded on the right, one block in memory.

In a causal model a token's prediction does not depend on later tokens, so padding on the right needs no mask. Results at
the padding are ignored.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.machine.device import Where
from compresskit.models.model import Model
from compresskit.recovery.data.encoding import Sample
from compresskit.walk.cost import FLOAT32_BYTES, micro_batch_size
from compresskit.walk.walk import Walk, windows_of

HIDDEN_BYTES = 1 << 28
"""Bound on the hidden states of one chunk of samples, per model (256 MiB)."""
LOGITS_BYTES = 1 << 26
"""Bound on the live float32 logits, per model (64 MiB)."""


class Rows(NamedTuple):
    """Positions in samples, and the models' predictions there."""

    owners: Tensor
    """(rows,) the sample of the chunk to which each row belongs."""
    positions: Tensor
    """(rows,) position in the sample; the logits predict the next token."""
    targets: Tensor
    """(rows,) the next token."""
    logits: tuple[Tensor, ...]
    """(rows, vocabulary) float32, one per model."""


def open_walk(model: Model, where: Where) -> Walk:
    """Open a walk without tokens, for `walked`."""
    return Walk(model, torch.zeros(0, 1, dtype=torch.int64), where)


def chunks(samples: Sequence[Sample], hidden_size: int) -> list[list[int]]:
    """Sort the samples by length into chunks whose padded hidden states stay below `HIDDEN_BYTES`."""
    most_tokens = HIDDEN_BYTES // (hidden_size * FLOAT32_BYTES)
    found: list[list[int]] = []
    # Longest first, so that running out of memory happens at the start or never.
    for index in sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens)):
        longest = len(samples[found[-1][0]].tokens) if found else 0
        if not found or (len(found[-1]) + 1) * longest > most_tokens:
            found.append([])
        found[-1].append(index)
    return found


def padded(samples: Sequence[Sample]) -> Tensor:
    """Pad to (samples, longest) int64, on the right, with token 0."""
    rows = [torch.tensor(sample.tokens, dtype=torch.int64) for sample in samples]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def walked(walks: Sequence[Walk], samples: Sequence[Sample]) -> list[Walk]:
    """Walk all models over these samples, in the same micro-batches.

    A micro-batch is as long as its longest sample; samples sorted by length need little padding.

    Returns:
        The finished walks; `hidden` is the output of the last block, of this rank's micro-batches.
    """
    longest = max(len(sample.tokens) for sample in samples)
    size = min(micro_batch_size(walk.model, longest) for walk in walks)
    batches = [padded(samples[start : start + size]) for start in range(0, len(samples), size)]
    done = []
    for walk in walks:
        part = copy.copy(walk)
        part.hidden, part.all_batches = [], batches
        for _ in part:
            pass
        done.append(part)
    return done


def mean_hidden(done: Walk, samples: Sequence[Sample]) -> Tensor:
    """Mean of the last block's output over each sample's tokens: (samples, hidden) float32 on the CPU, on every rank."""
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    means = torch.zeros(len(samples), done.model.hidden_size)
    for first, hidden in zip(first_samples(done), map(windows_of, done.hidden), strict=True):
        counts = lengths[first : first + len(hidden)]
        inside = (torch.arange(hidden.shape[1]) < counts[:, None]).to(hidden)
        sums = (hidden.float() * inside[:, :, None].float()).sum(dim=1).cpu()
        means[first : first + len(hidden)] = sums / counts[:, None]
    return distributed.total(means)


def first_samples(done: Walk) -> list[int]:
    """The first sample of each micro-batch of this rank."""
    firsts = list(itertools.accumulate((len(batch) for batch in done.all_batches), initial=0))
    return [firsts[number] for number in done.numbers]


@torch.no_grad()
def predictions(done: Sequence[Walk], samples: Sequence[Sample], whole: bool = False) -> Iterator[Rows]:
    """Predictions for the responses of the samples in this rank's micro-batches, or with `whole` for every token but the first.

    `done`: walks over these samples (`walked`). At most `LOGITS_BYTES` of logits per model exist at the same time.

    Yields:
        Rows ordered by sample and position; logits (rows, vocabulary) float32, one per model.
    """
    starts = torch.tensor([1 if whole else max(1, sample.response_start) for sample in samples])
    ends = torch.tensor([len(sample.tokens) for sample in samples])
    places = torch.arange(int(ends.max()))
    chosen = (places >= starts[:, None] - 1) & (places < ends[:, None] - 1)
    step = max(1, LOGITS_BYTES // (done[0].model.vocabulary * FLOAT32_BYTES))
    for first, *outputs in zip(first_samples(done[0]), *(walk.heads() for walk in done), strict=True):
        batch = outputs[0][0]
        owners, positions = chosen[first : first + len(batch)].nonzero(as_tuple=True)
        for start in range(0, len(owners), step):
            part = slice(start, start + step)
            owner, position = owners[part], positions[part]
            # Pass each position as a text of one token: families with learned positions have no more than their context.
            logits = tuple(head(hidden[..., owner, position, :].unsqueeze(-2))[:, 0].float() for _, hidden, head in outputs)
            yield Rows(owner + first, position, batch[owner, position + 1], logits)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of logits (rows, vocabulary) at targets (rows,) int64 on any device -> (rows,)."""
    return torch.nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="none")


def response_losses(walk: Walk, samples: Sequence[Sample]) -> Iterator[tuple[int, float]]:
    """Yield (sample, mean loss of its response tokens in nats), chunk by chunk, on every rank."""
    for chunk in chunks(samples, walk.model.hidden_size):
        sums = torch.zeros(len(chunk), dtype=torch.float64)
        members = [samples[i] for i in chunk]
        for rows in predictions(walked([walk], members), members):
            sums.index_add_(0, rows.owners, token_losses(rows.logits[0], rows.targets).double().cpu())
        distributed.total(sums)
        for index, total in zip(chunk, sums.tolist(), strict=True):
            yield index, total / max(1, samples[index].response_tokens)
