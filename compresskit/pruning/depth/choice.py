"""Which blocks to remove: equations 1 to 3 of method.py, each measured by walks with one block in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from compresskit import distributed
from compresskit.errors import UnsupportedArchitecture
from compresskit.evaluation.request import CHUNK_BYTES
from compresskit.pruning.influence import AngularDistance, block_distances
from compresskit.walk.cost import FLOAT32_BYTES
from compresskit.walk.hidden_states import copied
from compresskit.walk.sequence import OnBlock
from compresskit.walk.walk import Walk

Allowed = Callable[[Collection[int]], bool]
"""Whether these blocks may go together."""


class Chosen(NamedTuple):
    """The blocks that go, and the figures behind the choice."""

    removed: list[int]
    """Ascending."""
    figures: dict[str, Any]
    """For the manifest: "distances" by block or by start of a run, or "order" and "divergences" by round."""


def least_turning(distances: Sequence[float], count: int, allowed: Allowed) -> list[int]:
    """Equation 1: the `count` blocks of the least distances that may go together."""
    removed: list[int] = []
    for index in sorted(range(len(distances)), key=lambda index: (distances[index], index)):
        if len(removed) < count and allowed([*removed, index]):
            removed.append(index)
    return sorted(removed)


def least_turning_run(distances: Sequence[float], count: int, allowed: Allowed) -> list[int]:
    """Equation 2: the run of `count` blocks of the least distance, [] if none may go; `distances` by its first block."""
    for start in sorted(range(len(distances)), key=lambda start: (distances[start], start)):
        if allowed(range(start, start + count)):
            return list(range(start, start + count))
    return []


def by_angle(walk: Walk, count: int, allowed: Allowed, on_block: OnBlock) -> Chosen:
    """Measure every block's distance and choose."""
    distances = list(block_distances(walk, on_block))
    return Chosen(least_turning(distances, count, allowed), {"distances": distances})


@torch.no_grad()
def by_run(walk: Walk, count: int, allowed: Allowed, on_block: OnBlock) -> Chosen:
    """Measure the distance over every run of `count` blocks and choose; holds the hidden states of `count` blocks.

    Returns:
        The run of the least distance, and the distances.

    Raises:
        UnsupportedArchitecture: no run may go, because each holds the last block of some kind.
    """
    before: deque[list[Any]] = deque()
    distances = []
    for block in walk:
        before.append(copied(block.hidden))
        block.advance()
        if len(before) == count:
            distance = AngularDistance()
            for first, last in zip(before.popleft(), block.hidden, strict=True):
                distance.add(first, last)
            distance.share(block.micro_batches)
            distances.append(distance.mean)
        on_block("angles", block.index + 1, walk.model.block_count)
    removed = least_turning_run(distances, count, allowed)
    if not removed:
        raise UnsupportedArchitecture(
            f"{walk.model.family}: every run of {count} blocks holds all of one kind, or one that has to stay; "
            "pass --choose loss, or remove fewer"
        )
    return Chosen(removed, {"distances": distances})


@torch.no_grad()
def by_loss(walk: Walk, count: int, allowed: Allowed, on_block: OnBlock, candidates: int = 0) -> Chosen:
    """Remove one block at a time: the one whose loss moves the whole model least from the original (equation 3).

    The first round tries every block, the others the `candidates` that cost least when they were last tried; 0 for all. In a
    round the model walks once: at each block that is tried a stream of hidden states splits off, which leaves that block out and
    runs through those after it, so that every block is read once for all of them.

    Returns:
        The blocks, the order in which they went, and the divergence in nats a token after each.
    """
    removed: list[int] = []
    divergences: list[float] = []
    original: list[Any] = []
    known = dict.fromkeys(range(walk.model.block_count), 0.0)
    for number in range(count):
        tried = sorted((index for index in known if allowed([*removed, index])), key=lambda index: (known[index], index))
        streams = _streams(walk, removed, tried[: candidates or None] if number else tried, on_block)
        original = original or copied(walk.hidden)
        known.update(zip(streams, divergences_of(walk, original, list(streams.values())), strict=True))
        best = min(streams, key=lambda index: (known[index], index))
        removed.append(best)
        divergences.append(known.pop(best))
    return Chosen(sorted(removed), {"order": removed, "divergences": divergences})


def _streams(walk: Walk, removed: Collection[int], tried: Collection[int], on_block: OnBlock) -> dict[int, list[Any]]:
    """Walk without the `removed` blocks; the last hidden states without each of the `tried` ones as well, by its number."""
    streams: dict[int, list[Any]] = {}
    for block in walk:
        on_block(f"{len(removed) + 1} of the blocks to remove", block.index + 1, walk.model.block_count)
        if block.index in removed:
            block.advanced = True
            continue
        for stream in streams.values():
            for number, hidden in enumerate(stream):
                stream[number] = block.run(hidden, number)
        if block.index in tried:
            streams[block.index] = copied(block.hidden)
    return streams


def divergences_of(walk: Walk, original: Sequence[Tensor], streams: Sequence[Sequence[Tensor]]) -> list[float]:
    """KL divergence from the original in nats a token, by stream; all are last hidden states, by micro-batch of this rank."""
    sums = []
    for number, (tokens, _, head) in enumerate(walk.heads()):
        totals = [0.0] * len(streams)
        for window, rows in _pieces(tokens, walk.model.vocabulary):
            place = (..., slice(window, window + 1), rows, slice(None))
            reference = head(original[number][place]).float().log_softmax(dim=-1)
            for which, stream in enumerate(streams):
                found = head(stream[number][place]).float().log_softmax(dim=-1)
                totals[which] += float(functional.kl_div(found, reference, log_target=True, reduction="sum").double())
        sums.append(totals)
    sums = distributed.in_order(sums, len(walk.all_batches))
    count = sum(batch.numel() for batch in walk.all_batches)
    return [sum(each) / count for each in zip(*sums, strict=True)]


def _pieces(tokens: Tensor, vocabulary: int) -> Iterator[tuple[int, slice]]:
    """Windows of a micro-batch, and rows of these whose logits are not too many at once."""
    step = max(1, CHUNK_BYTES // (vocabulary * FLOAT32_BYTES))
    for window in range(tokens.shape[0]):
        for start in range(0, tokens.shape[1], step):
            yield window, slice(start, min(start + step, tokens.shape[1]))
