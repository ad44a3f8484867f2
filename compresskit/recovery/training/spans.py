"""Train a grid span by span, N consecutive blocks together, for models that do not fit into memory.

What is trained of a block, and how it is stored, is that of grid.py. The original and the model in training are walked side by
side over the same samples: X are the hidden states that the original's blocks give, X' those that the trained ones give. The
blocks i to i + N - 1 minimise

    L = mean over tokens of e_t,    y = trained_{i..i+N-1}(X'),    h = original_{i..i+N-1}(X)                  (1)

with e_t of numerics/token_errors.py. The last span minimises the loss of the whole network, on the original's predictions and
the data's own tokens; where one span has all blocks, that is the only loss. A span is kept only if its loss on held-back samples
fell.

CBQ, arXiv 2312.07950, trains spans of blocks that overlap; here each block is in one. A sample is a micro-batch of its own: its
states are those that it has alone, without padding.

Memory: N blocks with what is trained of them, one block of the original, and the hidden states of all samples on both streams,
in mapped files where they are large. Finished spans lie in the workspace; from there the walk reads their blocks.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresskit.checkpoint.headers import read_header
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import storing, write_whole_json, write_whole_tensors
from compresskit.errors import NumericalError
from compresskit.formats.compressed_tensors import PackQuantized
from compresskit.machine.device import Where
from compresskit.machine.memory import release_freed_memory
from compresskit.models import meta
from compresskit.models.model import Model
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.held_back import mean_losses
from compresskit.recovery.forward import open_walk
from compresskit.recovery.training.batches import History, TrainingData, batch_of
from compresskit.recovery.training.checkpoints import COMPLETE, hashes, is_whole
from compresskit.recovery.training.grid import GridModel
from compresskit.recovery.training.span import Span, hidden_loss, predicted_loss, train_span
from compresskit.recovery.work import Recovery
from compresskit.walk.block import Block
from compresskit.walk.calls import Calls
from compresskit.walk.walk import Walk

SPANS = "spans"
"""Workspace folder with a folder for each finished span."""
TENSORS, FACTS = "trained.safetensors", "facts.json"


@dataclass(frozen=True)
class TrainedSpans:
    """The result of all spans."""

    model: Model
    """The source with the trained tensors, which are read from the workspace."""
    history: History
    """Of the last span, in nats."""
    facts: list[dict[str, Any]]
    """Of each span: its "blocks", its mean loss on the samples that judge "before" and "after", and which is "kept"."""
    judged: dict[str, float] | None
    """Response loss of the source "before" and of the trained model "after", nats per token; None without held-back samples."""


@dataclass(frozen=True)
class Streams:
    """The samples that both walks carry, one a micro-batch: those to train on, longest first, then the held-back ones."""

    data: TrainingData
    judged: TrainingData
    seen: Sequence[int]
    """Samples of `data` that the steps use."""

    @property
    def samples(self) -> list[Sample]:
        """All samples, in their order."""
        return [self.data.samples[i] for i in self.seen] + list(self.judged.samples)

    @property
    def judges(self) -> range:
        """Micro-batches that decide what is kept: the held-back ones, or all where there are none."""
        count = len(self.seen)
        return range(count, count + len(self.judged.samples)) if self.judged.samples else range(count)

    @property
    def steps(self) -> list[list[int]]:
        """Micro-batches of every step."""
        number_of = {sample: number for number, sample in enumerate(self.seen)}
        return [[number_of[i] for i in itertools.chain(*step)] for step in self.data.steps]

    def batch(self, number: int) -> dict[str, Tensor]:
        """A micro-batch with what is learned of it."""
        held = number - len(self.seen)
        return batch_of(self.data, [self.seen[number]]) if held < 0 else batch_of(self.judged, [held])


def train_spans(recovery: Recovery, data: TrainingData, judged: TrainingData) -> TrainedSpans:
    """Train all spans in order, on two streams; those that an interrupted run has finished are read.

    Returns:
        The model, which is better or worse than the source.

    Raises:
        NumericalError: a loss became NaN or infinity.
        StorageError: a finished span could not be saved.
    """
    where = recovery.where._replace(scratch=recovery.work.path / "scratch")
    exact = where._replace(dtype=torch.float32)  # a narrower dtype would round small steps away
    model, held = replace(recovery.request.model, adapter=None), judged.samples
    streams = streams_of(data, judged)
    walks = _walk(recovery.original, where, streams.samples), _walk(model, exact, streams.samples)
    before = _response_loss(model, exact, held) if held else None
    trained, parts = _walked(recovery, streams, *walks)
    figures = None if before is None else {"before": before, "after": _response_loss(trained, exact, held)}
    return TrainedSpans(trained, parts[-1]["history"], [part["facts"] for part in parts], figures)


def streams_of(data: TrainingData, judged: TrainingData) -> Streams:
    """The samples of all steps, each once, and those that judge."""
    seen = {i for step in data.steps for i in itertools.chain(*step)}
    return Streams(data, judged, sorted(seen, key=lambda i: (-len(data.samples[i].tokens), i)))


@torch.no_grad()
def _walked(recovery: Recovery, streams: Streams, original: Walk, student: Walk) -> tuple[Model, list[dict[str, Any]]]:
    """The trained model, and what is saved about each span. `student`: the walk through the model in training."""
    trained, parts = student.model, []
    calls, blocks, count = student.capture(), iter(original), trained.block_count
    for span in _spans(count, recovery.request.options.blocks_at_once):
        targets = _outputs(original, itertools.islice(blocks, len(span)))
        folder = recovery.request.workspace / SPANS / f"{span[0]}-{span[-1]}"
        if not is_whole(folder):
            _save(folder, *_train(recovery, streams, student, calls, span, targets))
        trained = _with_tensors(trained, folder)
        student.finished = dict.fromkeys(range(span.stop), trained)
        _advance(student, span, calls)
        parts.append(read_json(folder / FACTS))
        recovery.bars("training", span.stop, count)
    return trained, parts


def _spans(blocks: int, size: int) -> list[range]:
    """Blocks that are trained together; the first span is what is left over, so that the last one has as many as may be."""
    ends = range(blocks % size or size, blocks + 1, size)
    return [range(max(0, end - size), end) for end in ends]


def _walk(model: Model, where: Where, samples: Sequence[Sample]) -> Walk:
    """A walk over these samples, not begun, one a micro-batch."""
    walk = open_walk(model, where)
    walk.all_batches = [torch.tensor([sample.tokens]) for sample in samples]
    return walk


def _outputs(walk: Walk, blocks: Iterator[Block]) -> list[Tensor]:
    """Advance the next blocks of a walk; returns its hidden states, which stay as they are until it goes on."""
    for block in blocks:
        block.advance()
        walk.release(block)
    release_freed_memory()
    return walk.hidden


def _advance(student: Walk, span: range, calls: list[Calls]) -> None:
    """Run the trained blocks, one in memory."""
    for index in span:
        block = student.filled(index, student.hidden, calls[index])
        block.advance()
        student.release(block)
        release_freed_memory()


def _response_loss(model: Model, where: Where, samples: Sequence[Sample]) -> float:
    """Mean loss of the responses, in nats per token."""
    return float(mean_losses(open_walk(model, where), samples, None)["loss_by_token"])


def _train(
    recovery: Recovery, streams: Streams, student: Walk, calls: list[Calls], span: range, targets: list[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the blocks of one span.

    `student`: its hidden states are the span's inputs. `calls`: the arguments of all blocks. `targets`: the original's hidden
    states after the span.

    Returns:
        The stored tensors by stored name, none where the start is kept, and what is saved about the span.

    Raises:
        NumericalError: a loss became NaN or infinity.
    """
    model, data = student.model, streams.data
    own = open_walk(model, Where(student.device, student.dtype, recovery.where.trust_remote_code))
    is_last = span.stop == model.block_count
    grid, blocks = opened(own, span, calls, recovery.original if recovery.request.options.train == "all" else None)
    loss = predicted_loss(own.head, streams.batch) if is_last else hidden_loss(targets)
    part = Span(blocks, student.hidden, loss, data.precision)
    groups = grid.parameter_groups(data.learning_rate, 2 * data.code_distance / len(data.steps))
    before = after = part.mean_loss(streams.judges)
    history: History = []
    if groups[0]["params"] and (is_last or blocks):
        try:
            history = train_span(part, groups, streams.steps)
            after = part.mean_loss(streams.judges)
        except NumericalError as error:
            raise NumericalError(f"training blocks {span[0]} to {span[-1]}: {error}; lower --learning-rate") from error
    kept = after < before
    stored = {model.stored_name(name): tensor for name, tensor in grid.stored().items()} if kept else {}
    facts = {"blocks": [span[0], span[-1]], "before": before, "after": after, "kept": "trained" if kept else "start"}
    return stored, {"facts": facts, "history": history}


def opened(own: Walk, span: range, calls: list[Calls], original: Model | None) -> tuple[GridModel, list[Block]]:
    """The blocks of a span, and with the last one all that comes after them, ready to be trained.

    `own`: a walk whose network is to hold nothing else, in float32. `calls`: the arguments of all blocks. `original`: as of
    GridModel.

    Returns:
        What is trained, and the blocks through which text runs, without inputs.
    """
    blocks = [own.filled(index, [], calls[index]) for index in span]
    if span.stop == own.model.block_count:
        meta.fill(own.model, own.network, "", own.device, own.dtype)
    return GridModel(own.network, own.model, original), [block for block in blocks if block.calls]


def _save(folder: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Save a finished span, its record last."""
    with storing(folder):
        if folder.exists():  # an interrupted run may have left half of another result
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    if tensors:
        write_whole_tensors(folder / TENSORS, {name: tensor.contiguous() for name, tensor in tensors.items()})
    write_whole_json(folder / FACTS, facts)
    write_whole_json(folder / COMPLETE, hashes(folder))


def _with_tensors(model: Model, folder: Path) -> Model:
    """The model with the tensors of a finished span, which are read from its file; the model itself where it keeps its start."""
    file = folder / TENSORS
    if not file.is_file():
        return model
    checkpoint = replace(model.checkpoint, file_of=model.checkpoint.file_of | dict.fromkeys(read_header(file).specs, file))
    assert isinstance(model.format, PackQuantized)
    return replace(model, checkpoint=checkpoint, format=replace(model.format, checkpoint=checkpoint))
