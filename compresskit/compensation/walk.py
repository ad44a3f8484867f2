"""The walk shared by compensation methods: block by block, linear by linear, on the repaired prefix.

The compressed model is walked. With aim "output" or "block", the original is walked beside it: each original block runs
before the repaired one, on its own inputs or on those of the repaired block.
Linears that share their input share its statistic and the eigendecomposition of its measure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.checkpoint.writer import Writer
from compresskit.compensation.method import Aim, CompensateMethod
from compresskit.compensation.residuals import Outputs, Paired, output_residual
from compresskit.errors import naming
from compresskit.formats.peft import factor_names
from compresskit.machine.progress import timed
from compresskit.models.meta import to_stored
from compresskit.models.pair import Pair
from compresskit.numerics.eight_bit_factors import EIGHT_BITS, eight_bit_factors
from compresskit.numerics.lowrank import Metric, gains, low_rank_factors, remaining_error, weighted
from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock, chosen_sequence, finish_block, replace_weight
from compresskit.walk.statistics import Gram
from compresskit.walk.walk import Walk

OUTPUT_DAMPING = 0.01
"""Damping of equation 2 in residuals.py, as a share of the mean second moment."""


class Task(NamedTuple):
    """One linear and its residual to repair."""

    name: str
    residual: Tensor
    metric: Metric
    weights: Tensor | None
    """Weight of each output, (out,); None for equal weights."""

    def error(self, update: Tensor) -> float:
        """Remaining error after an update (out, in), in the task's own measure."""
        return remaining_error(self.residual, self.metric, update, self.weights)


@dataclass
class Repair:
    """A request for the walk, and the time spent on it."""

    method: CompensateMethod
    pair: Pair
    names: list[str]
    """Linears to repair, by plain name."""
    aim: Aim
    ranks: dict[str, int] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)
    """By linear, by what readers multiply the stored product; 1 where not given."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """By linear, the weight of each output's error, (out,) float64; empty for equal weights."""
    dtype: torch.dtype = torch.float16
    """Dtype of the factors; float8 e4m3 for 8 bits."""
    merged: torch.dtype | None = None
    """Dtype of the weights if a dense checkpoint is written; None for an adapter alone."""
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "decompositions": 0.0})

    def sequence(self, index: int) -> list[list[tuple[str, ...]]]:
        """The linears of a block to repair, as in `Model.linear_sequence`."""
        return chosen_sequence(self.pair.compressed, index, set(self.names))


def repair_blocks(request: Repair, walks: tuple[Walk, Walk | None], writer: Writer, on_block: OnBlock) -> None:
    """Repair all blocks. Each block's facts go to `writer.facts["blocks"]`, its tensors to the writer.

    `walks`: of the compressed model, and of the original if its outputs are the aim. Blocks finished by an interrupted run are
    read from its output and only run.
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
    """Measure the reduction of every linear's output error by each further rank.

    One pass over the unrepaired compressed model measures all linears of a block at once.

    Returns:
        By linear, min(out, in) falling numbers: weighted if outputs are weighted, else shares of the energy of the original's
        output; empty if that energy is zero.
    """
    count = request.pair.compressed.block_count
    found: dict[str, list[float]] = {}
    for compressed, original in _side_by_side(request, walks):
        groups = [group for position in request.sequence(compressed.index) for group in position]
        outputs = _original_outputs(request, original, groups)
        own: dict[str, list[float]] = {}
        for number, (name, task_of) in enumerate(_tasks(request, compressed, groups, outputs, False)):
            if number in distributed.own(number + 1):
                with timed(request.seconds, "decompositions"):
                    own[name] = _gains(request, task_of())
        measured = {name: values for each in distributed.every(own) for name, values in each.items()}
        found |= {name: measured[name] for group in groups for name in group}
        on_block("measuring", compressed.index + 1, count)
    return found


def _gains(request: Repair, task: Task) -> list[float]:
    energy = 1.0
    if task.weights is None:
        weight = request.pair.original_weight(task.name).to(task.residual)
        energy = remaining_error(weight, task.metric, torch.zeros_like(weight))
    taken = gains(weighted(task.residual, task.weights), task.metric)
    return (taken / energy).tolist() if energy else []


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
    facts: dict[str, dict[str, float]] = {"error_before": {}, "error_after": {}, "rank": {}}
    for number, groups in enumerate(sequence):
        tasks = _tasks(request, block, groups, outputs, number >= block.mixer_positions)
        for place, (name, task_of) in enumerate(tasks):
            with timed(request.seconds, "decompositions"):
                errors = _repair_linear(request, block, name, task_of, place % distributed.count(), writer)
            short = name.removeprefix(block.name + ".")
            facts["rank"][short] = request.ranks.get(name, 0)
            facts["error_before"][short], facts["error_after"][short] = errors
    return facts


def _original_outputs(request: Repair, original: Block | None, groups: list[tuple[str, ...]]) -> dict[str, Outputs]:
    """Run the original block and advance it; its linears' outputs, by the name of each group's first linear."""
    if original is None:
        return {}
    with timed(request.seconds, "forward"):
        found = {group[0]: Outputs([_aimed_weight(request, original, name) for name in group]) for group in groups}
        original.advance(found)
    return found


def _aimed_weight(request: Repair, original: Block, name: str) -> Tensor:
    """The original's weight whose outputs the linear should match: all inputs, the remaining rows."""
    weight = original.linear(name).weight
    return weight if request.pair.lost_inputs(name) else request.pair.aimed_weight(name).to(weight)


def _tasks(
    request: Repair, block: Block, groups: list[tuple[str, ...]], outputs: Mapping[str, Outputs], attention_is_final: bool
) -> Iterator[tuple[str, Callable[[], Task]]]:
    """The linears of some groups, each with what makes its residual and measure: of several ranks only one does."""
    method = request.method
    statistics: dict[str, Paired] = {}
    if block.micro_batches and (method.needs_activations or outputs):
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
        # Made when the first linear of the group needs it: of several ranks only some do.
        metric = functools.cache(partial(_metric, method, found, linear.in_features, linear.weight.device))
        row = 0
        for name in group:
            rows = len(block.linear(name).weight)
            yield name, partial(_task, request, block, name, found, slice(row, row + rows), metric)
            row += rows


def _metric(method: CompensateMethod, found: Paired | None, features: int, device: torch.device) -> Metric:
    """The measure of a group's errors; what it is made from is freed, unless the aim are outputs."""
    made = method.metric(found.statistic if found else None, features, device)
    if found is not None and found.outputs is None:
        found.statistic, found.gram = None, Gram(0)
    return made


def _task(request: Repair, block: Block, name: str, found: Paired | None, rows: slice, metric: Callable[[], Metric]) -> Task:
    """`rows`: where the linear's outputs lie among those of its group."""
    weight = block.linear(name).weight.detach()
    error = _weight_error(request, name, weight)
    if found is not None and found.outputs is not None and found.gram.tokens:
        error = output_residual(weight, error, found, rows, OUTPUT_DAMPING)
    return Task(name, error, metric(), request.weights.get(name))


def _weight_error(request: Repair, name: str, weight: Tensor) -> Tensor:
    """Equation 1 of residuals.py, or the weight itself for a split; 0 if the linear lost inputs."""
    if request.method.splits:
        return weight.float()
    if request.pair.lost_inputs(name):
        return torch.zeros_like(weight, dtype=torch.float32)
    return request.pair.original_weight(name).to(weight.device) - weight.float()


def _repair_linear(
    request: Repair, block: Block, name: str, task_of: Callable[[], Task], owner: int, writer: Writer
) -> list[float]:
    """Solve on the rank that owns the linear, write, and apply the repair to the block.

    Returns:
        The error before and after it, in the task's own measure.
    """
    rank, linear = request.ranks.get(name, 0), block.linear(name)
    scale = request.multipliers.get(name, 1.0)
    (rows, columns), device = linear.weight.shape, linear.weight.device
    first, second = (torch.zeros(shape, dtype=request.dtype, device=device) for shape in ((rank, columns), (rows, rank)))
    task = task_of() if owner == distributed.rank() else None
    if task and rank:
        first, second = _factors(request, task, rank, scale)
    for each in (first, second):
        distributed.send(each, owner)
    update = scale * second.float() @ first.float()
    errors = torch.zeros(2, dtype=torch.float64)
    if task:
        errors = torch.tensor([task.error(torch.zeros_like(update)), task.error(update)], dtype=torch.float64)
    distributed.send(errors, owner)
    sign = -1 if request.method.splits else 1
    weight = linear.weight.float() + sign * update
    if request.merged is not None:
        compressed = request.pair.compressed
        weight = weight.to(request.merged)
        writer.put(compressed.stored_name(f"{name}.weight"), to_stored(compressed, f"{name}.weight", weight))
    if request.merged is None or request.method.splits:
        _write_factors(request, name, (first, second), writer)
    if not request.method.splits:
        replace_weight(linear, weight)
    return errors.tolist()


def _factors(request: Repair, task: Task, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """The pair of a linear as it is stored, (rank, in) and (out, rank)."""
    if request.dtype == EIGHT_BITS:
        with naming(task.name):
            return eight_bit_factors(task.residual, task.metric, rank, scale, task.weights)
    first, second = low_rank_factors(task.residual, task.metric, rank, request.method.smallest, task.weights)
    return first.to(request.dtype), (second / scale).to(request.dtype)


def _write_factors(request: Repair, name: str, factors: tuple[Tensor, Tensor], writer: Writer) -> None:
    """Write the pair of one linear, appended to the compressed model's existing pair, if any."""
    adapter = request.pair.compressed.adapter
    first, second = factors
    if adapter is not None and adapter.holds(name) and request.merged is None:
        before, scale = adapter.factors(name), request.multipliers.get(name, 1.0)
        first, second = torch.cat([before[0].to(first), first]), torch.cat([(before[1] / scale).to(second), second], dim=1)
    if len(first):
        for stored, factor in zip(factor_names(name), (first, second), strict=True):
            writer.put(stored, factor)
