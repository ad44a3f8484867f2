"""From a selection to trained factors: the training set, the original's predictions, the ranks, the course."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compresskit.calibration.sampling import Sampling, self_tokens
from compresskit.machine.precision import matrix_products
from compresskit.machine.progress import ProgressBars, timed
from compresskit.models.model import Model
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.data.held_back import mean_losses
from compresskit.recovery.data.instructions import Instruction
from compresskit.recovery.forward import open_walk
from compresskit.recovery.method import DEFAULT_DATA_WEIGHT, DEFAULT_LEARNING_RATES, Selection
from compresskit.recovery.selection.files import read_selection
from compresskit.recovery.training import ranks as ranking
from compresskit.recovery.training.distillation import Teacher, ask, width_of
from compresskit.recovery.training.schedule import (
    ACCELERATOR_MICRO_BATCH_TOKENS,
    MICRO_BATCH_TOKENS,
    loss_curve,
    order_of,
    rectangles,
    rows,
    steps_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from compresskit.recovery.run import Job
    from compresskit.recovery.training.batches import Course
    from compresskit.recovery.training.trainer import Progress

    Where = tuple[torch.device, torch.dtype]


VECTORS = "vectors.safetensors"
"""The vectors of the pool and of what is held back, in the workspace."""
TRAINER = "trainer"
"""Its folder of the training's checkpoints."""


@dataclass(frozen=True)
class Training:
    """What came of the fine-tuning."""

    facts: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(A, B) by linear, float32."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Whole weights by plain name, float32, where those were trained."""


def fine_tune(job: Job, selection: Selection, where: Where, bars: ProgressBars) -> Training:
    """Train the blocks' weights, or low-rank pairs beside them, on the selection and on texts of the original itself."""
    samples = [job.pool[choice.sample] for choice in selection.choices]
    own = _own_samples(job, where, bars)
    samples += own
    options = job.options
    order = order_of(len(samples), options.batch_size, options.epochs, options.steps, options.seed)
    teacher = _teacher(job, samples, order, where, bars) if options.loss == "distill" else None
    network = _network(job, where)
    course = _course(job, network, samples, order, len(selection.choices), teacher)
    progress = lambda done, total, _: bars("training", done, total)  # noqa: E731
    train = _train_weights if options.update == "full" else _train_pairs
    with timed(job.seconds, "training"):
        trained, history = train(job, network, course, where[0], progress)
    facts = {
        "self_samples": len(own),
        "learning_rate": course.learning_rate,
        "data_weight": None if teacher is None else max(course.hard_weights),
        "steps": len(course.steps),
        "losses": [entry["loss"] for entry in history],
        "loss_curve": loss_curve([entry["loss"] for entry in history]),
        "tokens_learned": int(sum(entry["tokens"] for entry in history)),
    }
    return replace(trained, facts=facts | trained.facts)


def _network(job: Job, where: Where) -> PreTrainedModel:
    """The model to be trained, without its adapter, which pairs go on from."""
    from compresskit.recovery.training.trainer import whole_network

    # Small steps would be lost in the rounding of a narrower dtype; products are still taken in one.
    dtype = torch.float32 if job.options.update == "full" else where[1]
    model = replace(job.model, adapter=None)
    return whole_network(model, where[0], dtype, job.options.trust_remote_code, job.options.gradient_checkpointing)


def _course(
    job: Job, network: PreTrainedModel, samples: list[Sample], order: list[list[int]], chosen: int, teacher: Teacher | None
) -> Course:
    """What is learned, in which order; the first `chosen` samples are the selection. The network packs texts from here on."""
    from compresskit.recovery.training.batches import Course
    from compresskit.recovery.training.packing import pack

    options, lengths = job.options, [len(sample.tokens) for sample in samples]
    on_cpu = network.device.type == "cpu"
    packed = on_cpu and pack(network, max(lengths))  # many small attentions would keep an accelerator waiting
    most = MICRO_BATCH_TOKENS if on_cpu else ACCELERATOR_MICRO_BATCH_TOKENS
    group = partial(rows if packed else rectangles, most_tokens=most)
    steps = steps_of(lengths, order, group)
    rate = options.learning_rate or DEFAULT_LEARNING_RATES[options.update]
    width = width_of(int(job.model.checkpoint.config["vocab_size"]))
    # The original's predictions say at the prompt's tokens as much as at the response's.
    whole = [options.loss == "distill" or i >= chosen for i in range(len(samples))]
    # The original's own texts are samples of its predictions: beside these they would be noise.
    weight = DEFAULT_DATA_WEIGHT if options.data_weight is None else options.data_weight
    hard = [weight if i < chosen else 0.0 for i in range(len(samples))]
    return Course(
        samples, whole, steps, teacher, width, hard, rate, options.seed, options.checkpoint_steps, options.precision, packed
    )  # fmt: skip


def _train_weights(
    job: Job, network: PreTrainedModel, course: Course, device: torch.device, progress: Progress
) -> tuple[Training, list[dict[str, float]]]:
    from compresskit.recovery.training.trainer import BlockWeights, block_weights, train

    trained = BlockWeights(network, job.model.architecture.blocks)
    history = train(trained, course, device, job.workspace / TRAINER, progress)
    return Training(weights=block_weights(trained)), history


def _train_pairs(
    job: Job, network: PreTrainedModel, course: Course, device: torch.device, progress: Progress
) -> tuple[Training, list[dict[str, float]]]:
    from compresskit.recovery.training.trainer import add_factors, factors, train

    ranks = linear_ranks(job.model, job.options.rank)
    trained = add_factors(network, ranks, job.model.adapter, job.options.seed)
    history = train(trained, course, device, job.workspace / TRAINER, progress)
    facts = {"rank_total": sum(ranks.values()), "ranks": _block_ranks(job.model, ranks)}
    return Training(factors=factors(trained, list(ranks)), facts=facts), history


def linear_ranks(model: Model, rank: int) -> dict[str, int]:
    """Rank of every linear's pair: the adapter's own where there is one, else by the blocks' importances."""
    if model.adapter is not None:
        return {name: model.adapter.rank(name) for name in model.adapter.names}
    known = ranking.known_importances(model.checkpoint.manifest, model.block_count)
    by_block = ranking.block_ranks(rank, known or [1.0] * model.block_count)
    return {name: min(by_block[model.block_of(name)], *model.linear_shape(name)) for name in model.linears}


def _block_ranks(model: Model, ranks: dict[str, int]) -> list[int]:
    """The largest rank in every block."""
    found = [0] * model.block_count
    for name, rank in ranks.items():
        found[model.block_of(name)] = max(found[model.block_of(name)], rank)
    return found


def _own_samples(job: Job, where: Where, bars: ProgressBars) -> list[Sample]:
    """Fresh texts of the original: another seed than calibration text has."""
    options = job.options
    if not options.self_samples:
        return []
    how = Sampling(options.seed + 1, *where, options.trust_remote_code, lambda done, total: bars("sampling text", done, total))
    with timed(job.seconds, "sampling"):
        tokens, _ = self_tokens(job.original, (options.self_samples, options.sequence_length), how)
    rows: list[list[int]] = tokens.tolist()
    return [Sample(Instruction(i, "self", [], "", "self"), row, 1) for i, row in enumerate(rows)]


def _teacher(job: Job, samples: list[Sample], order: list[list[int]], where: Where, bars: ProgressBars) -> Teacher:
    seen = sorted({i for step in order for i in step})  # fewer than all where --steps or --epochs end before one epoch
    walk = open_walk(job.original, *where, job.options.trust_remote_code)
    with timed(job.seconds, "teacher"), matrix_products(where[0], job.options.precision):
        return ask(walk, samples, seen, job.workspace / "teacher", lambda done, total: bars("asking the original", done, total))


def held_back_losses(job: Job, model: Model, where: Where) -> dict[str, Any] | None:
    """Mean response losses of a model on what is never trained on; None where nothing is held back."""
    if not job.held_back:
        return None
    with timed(job.seconds, "held_back"):
        return mean_losses(open_walk(model, *where, job.options.trust_remote_code), job.held_back, held_back_clusters(job))


def held_back_clusters(job: Job) -> list[int] | None:
    """The cluster of the most similar sample of the pool, for every sample held back; None where there are no clusters."""
    selection, file = read_selection(job.workspace), job.workspace / VECTORS
    if selection is None or not selection.labels or not file.is_file():
        return None
    vectors: Tensor = load_file(file)["vectors"]
    pool, held = vectors.split([len(job.pool), len(job.held_back)])  # type: ignore[no-untyped-call]
    return [selection.labels[i] for i in (held @ pool.T).argmax(dim=1).tolist()]
