"""The walk that the compensations share: block by block, linear by linear, on the already repaired prefix.

The compressed model is walked; with aim "output" or "block" the original beside it, each of its blocks before the repaired
one, on its own inputs or on those of the repaired block.
Linears that share their input share its statistic and the eigendecomposition of its measure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit.checkpoint.writer import Writer
from compresskit.compensation.method import Aim, CompensateMethod
from compresskit.compensation.residuals import Outputs, Paired, output_residual
from compresskit.formats.peft import factor_names
from compresskit.machine.progress import timed
from compresskit.models.meta import to_stored
from compresskit.models.pair import Pair
from compresskit.numerics.lowrank import EIGHT_BITS, Metric, eight_bit_factors, gains, low_rank_factors, remaining_error, weighted
from compresskit.walk.block import Block
from compresskit.walk.sequence import ATTENTION_POSITIONS, OnBlock, chosen_sequence, finish_block, replace_weight
from compresskit.walk.walk import Walk

OUTPUT_DAMPING = 0.01
"""Of equation 2 in residuals.py, as a share of the mean second moment."""


class Task(NamedTuple):
    """One linear and what is to be repaired in it."""

    name: str
    residual: Tensor
    metric: Metric
    weights: Tensor | None
    """How much each output counts, (out,); all alike for None."""

    def error(self, update: Tensor) -> float:
        """What an update (out, in) leaves of the error, in the task's own measure."""
        return remaining_error(weighted(self.residual, self.weights), self.metric, weighted(update, self.weights))


@dataclass
class Repair:
    """A request that the walk serves, and the time that it took."""

    method: CompensateMethod
    pair: Pair
    names: list[str]
    """Linears to repair, by plain name."""
    aim: Aim
    ranks: dict[str, int] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """By linear, how much the predictions mind an error in each output, (out,) float64; empty where all count alike."""
    dtype: torch.dtype = torch.float16
    """Of the factors; float8 e4m3 for 8 bits."""
    merged: torch.dtype | None = None
    """Of the weights where a dense checkpoint is written; None for an adapter alone."""
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "decompositions": 0.0})

    def sequence(self, index: int) -> list[list[tuple[str, ...]]]:
        """The linears of a block that are repaired, as `Model.linear_sequence` gives them."""
        return chosen_sequence(self.pair.compressed, index, set(self.names))


def repair_blocks(request: Repair, walks: tuple[Walk, Walk | None], writer: Writer, on_block: OnBlock) -> None:
    """The repairing pass. Every block's facts go to `writer.facts["blocks"]`, its tensors to the writer.

    `walks`: of the compressed model, and of the original where the aim is its outputs. Blocks that an interrupted run has
    finished are only run, from what that run wrote.
    """
    count = request.pair.compressed.block_count
    for compressed, original in _side_by_side(request, walks):
        if compressed.index in writer.done:
            _original_outputs(request, original, [])
        else:
            facts = _repair_block(request, compressed, original, writer)
            finish_block(request.pair.compressed, compressed, writer, facts)
        with timed(request.seconds, "forward"):
            compressed.advance()
        on_block("compensating", compressed.index + 1, count)


def measured_gains(request: Repair, walks: tuple[Walk, Walk | None], on_block: OnBlock) -> dict[str, list[float]]:
    """What each further rank takes off the output error of every linear.

    One pass over the compressed model as it is: all linears of a block are measured at once.

    Returns:
        By linear min(out, in) numbers, falling: weighed where outputs are weighed, else as shares of the energy of the
        original's output, none where that has no energy.
    """
    count = request.pair.compressed.block_count
    found: dict[str, list[float]] = {}
    for compressed, original in _side_by_side(request, walks):
        groups = [group for position in request.sequence(compressed.index) for group in position]
        for task in _tasks(request, compressed, groups, _original_outputs(request, original, groups), False):
            with timed(request.seconds, "decompositions"):
                energy = 1.0
                if task.weights is None:
                    weight = request.pair.original_weight(task.name).to(task.residual)
                    energy = remaining_error(weight, task.metric, torch.zeros_like(weight))
                taken = gains(weighted(task.residual, task.weights), task.metric)
                found[task.name] = (taken / energy).tolist() if energy else []
        on_block("measuring", compressed.index + 1, count)
    return found


def _side_by_side(request: Repair, walks: tuple[Walk, Walk | None]) -> Iterator[tuple[Block, Block | None]]:
    compressed, original = walks
    if original is None:
        yield from ((block, None) for block in compressed)
        return
    for here, there in zip(compressed, original, strict=True):
        if request.aim == "block":
            there.take_inputs(here.hidden)
        yield here, there


def _repair_block(request: Repair, block: Block, original: Block | None, writer: Writer) -> dict[str, dict[str, float]]:
    sequence = request.sequence(block.index)
    outputs = _original_outputs(request, original, [group for position in sequence for group in position])
    facts: dict[str, dict[str, float]] = {"error_before": {}, "error_after": {}, "rank": {}, "scale": {}}
    for number, groups in enumerate(sequence):
        for task in _tasks(request, block, groups, outputs, number >= ATTENTION_POSITIONS):
            with timed(request.seconds, "decompositions"):
                short = task.name.removeprefix(block.name + ".")
                update, scale = _repair_linear(request, block, task, writer)
                facts["rank"][short] = request.ranks.get(task.name, 0)
                facts["scale"][short] = scale
                facts["error_before"][short] = task.error(torch.zeros_like(update))
                facts["error_after"][short] = task.error(update)
    return facts


def _original_outputs(request: Repair, original: Block | None, groups: list[tuple[str, ...]]) -> dict[str, Outputs]:
    """Run the original block for good; its linears' outputs by the name of each group's first linear."""
    if original is None:
        return {}
    with timed(request.seconds, "forward"):
        found = {group[0]: Outputs([_aimed_weight(request, original, name) for name in group]) for group in groups}
        original.advance(found)
    return found


def _aimed_weight(request: Repair, original: Block, name: str) -> Tensor:
    """The original's weight whose outputs the linear shall give: all inputs, the rows that are left."""
    weight = original.linear(name).weight
    return weight if request.pair.lost_inputs(name) else request.pair.original_weight(name).to(weight)


def _tasks(
    request: Repair, block: Block, groups: list[tuple[str, ...]], outputs: Mapping[str, Outputs], attention_is_final: bool
) -> Iterator[Task]:
    """The linears of some groups with their residuals and measures."""
    method = request.method
    statistics: dict[str, Paired] = {}
    if block.hidden and (method.needs_activations or outputs):
        with timed(request.seconds, "forward"):
            for group in groups:
                linear = block.linear(group[0])
                features, device = linear.in_features, linear.weight.device
                own = method.statistic(features, device) if method.needs_activations else None
                statistics[group[0]] = Paired(own, outputs.get(group[0]), features, device)
            block.collect(statistics, attention_is_final)
    for group in groups:
        found = statistics.pop(group[0], None)
        linear = block.linear(group[0])
        metric = method.metric(found.statistic if found else None, linear.in_features, linear.weight.device)
        row = 0
        for name in group:
            weight = block.linear(name).weight.detach()
            error = _weight_error(request, name, weight)
            if found is not None and found.outputs is not None and found.gram.tokens:
                error = output_residual(weight, error, found, slice(row, row + len(weight)), OUTPUT_DAMPING)
            row += len(weight)
            yield Task(name, error, metric, request.weights.get(name))


def _weight_error(request: Repair, name: str, weight: Tensor) -> Tensor:
    """Equation 1 of residuals.py, the weight itself for a split; 0 where the linear lost inputs."""
    if request.method.splits:
        return weight.float()
    if request.pair.lost_inputs(name):
        return torch.zeros_like(weight, dtype=torch.float32)
    return request.pair.original_weight(name).to(weight.device) - weight.float()


def _repair_linear(request: Repair, block: Block, task: Task, writer: Writer) -> tuple[Tensor, float]:
    """Solve, write, and put the repair into the block; returns (the update as stored, its scale)."""
    rank, linear = request.ranks.get(task.name, 0), block.linear(task.name)
    scale, dtype = 1.0, request.dtype
    rows, columns = task.residual.shape
    if not rank:
        first, second = (torch.zeros(shape, dtype=dtype, device=task.residual.device) for shape in ((0, columns), (rows, 0)))
    elif dtype == EIGHT_BITS:
        first, second, scale = eight_bit_factors(task.residual, task.metric, rank, task.weights)
    else:
        found = low_rank_factors(task.residual, task.metric, rank, request.method.smallest, task.weights)
        first, second = (factor.to(dtype) for factor in found)
    update = scale * second.float() @ first.float()
    sign = -1 if request.method.splits else 1
    weight = linear.weight.float() + sign * update
    if request.merged is not None:
        compressed, name = request.pair.compressed, f"{task.name}.weight"
        weight = weight.to(request.merged)
        writer.put(compressed.stored_name(name), to_stored(compressed, name, weight))
    if request.merged is None or request.method.splits:
        _write_factors(request, task.name, (first, second), writer)
    if not request.method.splits:
        replace_weight(linear, weight)
    return update, scale


def _write_factors(request: Repair, name: str, factors: tuple[Tensor, Tensor], writer: Writer) -> None:
    """The pair of one linear, after the one that the compressed model brings, if any."""
    adapter = request.pair.compressed.adapter
    first, second = factors
    if adapter is not None and adapter.holds(name) and request.merged is None:
        before = adapter.factors(name)
        first, second = torch.cat([before[0].to(first), first]), torch.cat([before[1].to(second), second], dim=1)
    if len(first):
        for stored, factor in zip(factor_names(name), (first, second), strict=True):
            writer.put(stored, factor)
