"""Fine-tune on a selection: the training data, the original's predictions, the trained factors or weights."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from compresskit.machine import sharding
from compresskit.machine.precision import matrix_products
from compresskit.machine.progress import timed
from compresskit.models.model import Model
from compresskit.recovery.cost import MICRO_BATCH_TOKENS
from compresskit.recovery.data.encoding import Sample
from compresskit.recovery.forward import open_walk
from compresskit.recovery.method import Selection
from compresskit.recovery.options import Update
from compresskit.recovery.training.batches import History, TrainingData, order_of, rectangles, rows, steps_of
from compresskit.recovery.training.distillation import TeacherPredictions, predict
from compresskit.recovery.training.ranks import largest_by_block
from compresskit.recovery.work import Recovery

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_LEARNING_RATES: dict[Update, float] = {"low-rank": 1e-3, "full": 2e-4, "grid": 2e-3}
"""For full updates, 1e-4 and 4e-4 recovered less on SmolLM2-135M (docs/evidence/recover.md)."""
DEFAULT_DATA_WEIGHT = 0.5
"""Recovered more than 0 and than 1 on three texts, two of them not instructions (docs/evidence/recover.md)."""
ACCELERATOR_MICRO_BATCH_TOKENS = 4096
"""Bound on a micro-batch on an accelerator, where kernel launches cost more than small products."""
TEACHER, TRAINER = "teacher", "trainer"
"""Workspace folders for the original's predictions and for the training checkpoints."""
CURVE_POINTS = 40
JUDGED_SAMPLES = 128
"""Held-back samples that decide whether a trained grid is kept."""
MARKS = "▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Training:
    """Result of a fine-tuning."""

    facts: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """(A, B) by linear, float32."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Whole weights by plain name, float32, if they were trained."""
    stored: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of a trained grid as they are stored, by plain name."""
    source: Model | None = None
    """The source with the trained tensors in the workspace, if spans of blocks were trained."""


def fine_tune(recovery: Recovery, selection: Selection) -> Training:
    """Train the blocks' weights, or low-rank pairs on them, with the selection and texts from the original itself."""
    options = recovery.request.options
    texts, own, _ = recovery.texts
    samples = [recovery.data.pool[choice.sample] for choice in selection.choices] + texts + own
    order = order_of(len(samples), options.batch_size, options.epochs, options.steps, options.seed)
    teacher = _teacher(recovery, samples, order) if options.learned == "distill" else None
    network = None if options.blocks_at_once else _network(recovery)
    data = _training_data(recovery, network, samples, order, (len(selection.choices), len(texts)), teacher)
    train_update = {"full": _train_weights, "low-rank": _train_pairs, "grid": _train_grid}[options.update]
    with timed(recovery.seconds, "training"):
        trained, history = train_update(recovery, network, data) if network is not None else _train_spans(recovery, data)
    losses = [entry["loss"] for entry in history]
    facts = {
        "self_samples": len(own),
        **({"text_samples": len(texts)} if texts else {}),
        "learning_rate": data.learning_rate,
        "data_weight": None if teacher is None else max(data.hard_weights),
        "steps": len(data.steps),
        "losses": losses,
        "loss_curve": loss_curve(losses),
        "tokens_learned": int(sum(entry["tokens"] for entry in history)),
    }
    return replace(trained, facts=facts | trained.facts)


def _teacher(recovery: Recovery, samples: list[Sample], order: list[list[int]]) -> TeacherPredictions:
    """The original's predictions for the samples that the steps use."""
    seen = sorted({i for step in order for i in step})  # fewer than all if --steps or --epochs end before one epoch
    walk, folder = open_walk(recovery.original, recovery.where), recovery.request.workspace / TEACHER
    precision = recovery.request.options.precision
    with timed(recovery.seconds, "teacher"), matrix_products(recovery.where.device, precision):
        return predict(walk, samples, seen, folder, recovery.bars.of("asking the original"))


def _network(recovery: Recovery) -> PreTrainedModel:
    """The model to train, without its adapter, whose pairs are trained further."""
    from compresskit.checkpoint.stock import quiet

    with quiet():  # peft imports bitsandbytes, which says what it lacks on a CPU
        from compresskit.recovery.training.networks import whole_network

    options, where = recovery.request.options, recovery.where
    if options.update != "low-rank":  # a narrower dtype would round small steps away; products may still use one
        where = where._replace(dtype=torch.float32)
    return whole_network(replace(recovery.request.model, adapter=None), where, options.gradient_checkpointing)


def _training_data(
    recovery: Recovery,
    network: PreTrainedModel | None,
    samples: list[Sample],
    order: list[list[int]],
    counts: tuple[int, int],
    teacher: TeacherPredictions | None,
) -> TrainingData:
    """Build the training data; `counts`: (selected samples, texts after them). A network may be set to pack texts."""
    from compresskit.recovery.training.packing import pack

    options, lengths = recovery.request.options, [len(sample.tokens) for sample in samples]
    chosen, given = counts[0], sum(counts)
    on_cpu = recovery.where.device.type == "cpu"
    # An accelerator would wait for many small attention calls.
    packed = on_cpu and network is not None and pack(network, max(lengths))
    most = MICRO_BATCH_TOKENS if on_cpu else ACCELERATOR_MICRO_BATCH_TOKENS
    # The original's own texts are samples of its predictions, so as hard targets they would only add noise.
    weight = DEFAULT_DATA_WEIGHT if options.data_weight is None else options.data_weight
    return TrainingData(
        samples=samples,
        # The original's predictions are as informative at the prompt's tokens as at the response's.
        whole=[options.learned == "distill" or i >= chosen for i in range(len(samples))],
        steps=steps_of(lengths, order, partial(rows if packed else rectangles, most_tokens=most)),
        teacher=teacher,
        hard_weights=[weight if i < given else 0.0 for i in range(len(samples))],
        learning_rate=options.learning_rate or DEFAULT_LEARNING_RATES[options.update],
        code_distance=options.code_distance,
        seed=options.seed,
        checkpoint_steps=options.checkpoint_steps,
        precision=options.precision,
        packed=packed,
    )


def _train_weights(recovery: Recovery, network: PreTrainedModel, data: TrainingData) -> tuple[Training, History]:
    """Train every weight of the blocks."""
    from compresskit.recovery.training.dealt_weights import DealtWeights
    from compresskit.recovery.training.networks import BlockWeights, block_weights
    from compresskit.recovery.training.trainer import train

    architecture = recovery.request.model.architecture
    # Which experts have gradients differs among ranks, and a sharded network has none to leave out.
    dealt = sharding.can_shard() and not architecture.has_experts
    trained = (DealtWeights if dealt else BlockWeights)(network, architecture.blocks)
    checkpoints = recovery.request.workspace / TRAINER
    history = train(trained, data, recovery.where.device, checkpoints, recovery.bars.of("training"))
    return Training(weights=block_weights(trained)), history


def _train_pairs(recovery: Recovery, network: PreTrainedModel, data: TrainingData) -> tuple[Training, History]:
    """Train a low-rank pair on every linear."""
    from compresskit.recovery.training.networks import add_factors, factors
    from compresskit.recovery.training.trainer import train

    model, ranks = recovery.request.model, recovery.request.ranks
    trained = add_factors(network, ranks, model.adapter, data.seed)
    checkpoints = recovery.request.workspace / TRAINER
    history = train(trained, data, recovery.where.device, checkpoints, recovery.bars.of("training"))
    facts = {"rank_total": sum(ranks.values()), "ranks": largest_by_block(model, ranks)}
    return Training(factors=factors(trained, list(ranks)), facts=facts), history


def _train_grid(recovery: Recovery, network: PreTrainedModel, data: TrainingData) -> tuple[Training, History]:
    """Train the grids of all packed linears, the norms and the biases; the start is kept where held-back text is worse after."""
    from compresskit.recovery.training.grid import GridModel
    from compresskit.recovery.training.steps import mean_loss
    from compresskit.recovery.training.trainer import train

    model, device = replace(recovery.request.model, adapter=None), recovery.where.device
    trained = GridModel(network, model, recovery.original if recovery.request.options.train == "all" else None)
    judged = _judged(recovery, data)
    before = mean_loss(trained, judged, device)
    history = train(trained, data, device, recovery.request.workspace / TRAINER, recovery.bars.of("training"))
    after = mean_loss(trained, judged, device)
    better, facts = _kept({"before": before, "after": after} if judged.samples else None)
    return Training(facts=facts, stored=trained.stored() if better else {}), history


def _train_spans(recovery: Recovery, data: TrainingData) -> tuple[Training, History]:
    """Like `_train_grid`, some blocks at a time."""
    from compresskit.recovery.training.spans import train_spans

    found = train_spans(recovery, data, _judged(recovery, data))
    better, facts = _kept(found.judged)
    return Training(facts={"spans": found.facts, **facts}, source=found.model if better else None), found.history


def _kept(judged: dict[str, float] | None) -> tuple[bool, dict[str, Any]]:
    """(Whether the trained grid is kept, facts about it), by the loss "before" and "after"; None without held-back samples."""
    better = judged is None or judged["after"] < judged["before"]
    return better, {"judged": judged, "kept": "trained" if better else "start"}


def _judged(recovery: Recovery, data: TrainingData) -> TrainingData:
    """At most `JUDGED_SAMPLES` held-back samples, grouped as those to train on."""
    held = recovery.held_back
    few = random.Random(data.seed).sample(held, min(JUDGED_SAMPLES, len(held)))  # noqa: S311
    lengths = [len(sample.tokens) for sample in few]
    steps = steps_of(lengths, [[i] for i in range(len(few))], partial(rows if data.packed else rectangles))
    return replace(data, samples=few, whole=[False] * len(few), steps=steps, teacher=None)


def loss_curve(losses: Sequence[float]) -> str:
    """Draw the losses of all steps as one line of at most `CURVE_POINTS` marks, each a mean, lowest to highest."""
    points = min(CURVE_POINTS, len(losses))
    bounds = [len(losses) * i // points for i in range(points + 1)] if points else []
    means = [sum(losses[first:last]) / (last - first) for first, last in itertools.pairwise(bounds)]
    low, width = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(MARKS[round((mean - low) / width * (len(MARKS) - 1)) if width else 0] for mean in means)
