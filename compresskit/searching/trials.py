"""Measure the divergence of many low-bit models at once, without writing any.

    KL(a) = mean over positions of sum_v P(v) (log P(v) - log P_a(v))        P: the original's, P_a: with the options a

One walk reads a block once and runs a stream of hidden states for every trial through it, with that trial's weights: the
codes of scoring.py, multiplied out as readers do. Trials with the same options up to a block share one stream up to it.
Only the last hidden states are kept; the logits are compared a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from compresskit.evaluation.language_modelling import chunks, token_divergences
from compresskit.formats.compressed_tensors import weight_of
from compresskit.searching.candidates import Unit
from compresskit.searching.knapsack import Assignment
from compresskit.searching.scoring import codes_file
from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock, replace_weight
from compresskit.walk.walk import Walk

Put = Callable[[Assignment], None]
"""function(an option for each unit of a block): give its linears the weights under these options."""


@dataclass
class _Stream:
    """Hidden states that some trials share so far."""

    hidden: list[Tensor]
    """By micro-batch, (..., windows, length, hidden) each; of a model with several residual streams with these before."""
    trials: list[int]
    """Their numbers among the assignments."""


@torch.no_grad()
def divergences(
    walk: Walk, units: Sequence[Unit], folder: Path, assignments: Sequence[Assignment], dtype: torch.dtype, on_block: OnBlock
) -> list[list[float]]:
    """Measure assignments on some windows. `walk`: of the original over the windows.

    `folder`: of the codes. `dtype`: in which readers multiply them out.

    Returns:
        Mean KL of every window in nats a token, for every assignment.

    Raises:
        NumericalError: activations are not finite.
    """
    streams = [_Stream([], list(range(len(assignments))))]
    for block in walk:
        if block.index == 0:
            streams[0].hidden = list(block.hidden)
        numbers = [number for number, unit in enumerate(units) if unit.block == block.index]
        streams = _advanced(block, [units[n] for n in numbers], streams, _chosen(numbers, assignments), (folder, dtype))
        on_block("trials", block.index + 1, walk.model.block_count)
    found: list[list[float]] = [[] for _ in assignments]
    for number, (tokens, hidden, head) in enumerate(walk.heads()):
        for window in range(len(tokens)):
            part = slice(window, window + 1)
            own = [stream.hidden[number][..., part, :, :] for stream in streams]
            sums = _sums(head, walk.model.vocabulary, hidden[..., part, :, :], own)
            for stream, value in zip(streams, sums, strict=True):
                for trial in stream.trials:
                    found[trial].append(value / tokens.shape[1])
    return found


def _chosen(numbers: Sequence[int], assignments: Sequence[Assignment]) -> list[Assignment]:
    """Of each trial the options of these units."""
    return [tuple(assignment[number] for number in numbers) for assignment in assignments]


def _advanced(
    block: Block, units: Sequence[Unit], streams: Sequence[_Stream], chosen: Sequence[Assignment], codes: tuple[Path, torch.dtype]
) -> list[_Stream]:
    """Run the block with the weights of every trial; trials that differ from here on part."""
    found = []
    with _weights(block, units, *codes) as put:
        for options in sorted(set(chosen)):
            put(options)
            for stream in streams:
                trials = [trial for trial in stream.trials if chosen[trial] == options]
                if trials:
                    found.append(_Stream(block.run_all(stream.hidden), trials))
    return found


@contextmanager
def _weights(block: Block, units: Sequence[Unit], folder: Path, dtype: torch.dtype) -> Iterator[Put]:
    """Yield the function that gives the block the weights of some options; the original's come back."""
    originals = {name: block.linear(name).weight for unit in units for name in unit.linears}
    with safe_open(codes_file(folder, block.index), framework="pt") as file:

        def put(options: Assignment) -> None:
            for unit, option in zip(units, options, strict=True):
                for name in unit.linears:
                    codes, scale = (file.get_tensor(f"{name}|{option}.{leaf}") for leaf in ("codes", "scale"))
                    zero = torch.zeros(scale.shape, dtype=torch.int8)
                    replace_weight(block.linear(name), weight_of(codes, zero, scale.to(dtype)))

        yield put
    for name, weight in originals.items():
        block.linear(name).weight = weight


def _sums(head: Callable[[Tensor], Tensor], vocabulary: int, original: Tensor, trials: Sequence[Tensor]) -> list[float]:
    """Sum of the KL over the positions of one window, for each stream; hidden states (..., 1, length, hidden)."""
    sums = [0.0] * len(trials)
    for rows in chunks(original.shape[-2], vocabulary):
        wanted = head(original[..., rows, :]).float()[0]
        for number, hidden in enumerate(trials):
            sums[number] += float(token_divergences(head(hidden[..., rows, :]).float()[0], wanted).double().sum())
    return sums
