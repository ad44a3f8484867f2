"""Train a network's low-rank updates, or its blocks' weights, with transformers' Trainer, resumably."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from compresskit import distributed
from compresskit.checkpoint.stock import quiet
from compresskit.machine.memory import freed_memory_kept, release_freed_memory
from compresskit.machine.precision import takes_bfloat16
from compresskit.recovery.training.batches import History, TrainingData, collate
from compresskit.recovery.training.checkpoints import last_checkpoint
from compresskit.recovery.training.dealt_weights import DealtWeights, DealtWeightsTrainer
from compresskit.recovery.training.grid import GridModel
from compresskit.recovery.training.networks import BlockWeights
from compresskit.recovery.training.steps import Steps, StepTrainer

WARM_UP = 0.05
"""Share of the steps for the learning rate's warm-up."""
KEPT_CHECKPOINTS = 2
"""A kill or the disk may damage the newest checkpoint; the one before it is complete."""
RELEASE_STEPS = 5
"""Number of steps between releases of freed memory."""
LARGEST_NORM = 1.0
"""Gradient clipping norm, Trainer's default."""

Progress = Callable[[int, int], None]
"""Called with (steps done, total steps)."""


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Reports progress after every step and regularly releases freed memory."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Trainer's callback."""
        # Micro-batches of ever new lengths leave holes that the next ones do not fit, 0.15 GB more at each new length. Releasing
        # memory means requesting it again; after every step this took a seventh of the time.
        if state.global_step % RELEASE_STEPS == 0:
            release_freed_memory()
        self.progress(state.global_step, state.max_steps)


def _optimizer(trained: Any, data: TrainingData) -> torch.optim.Optimizer | None:
    """The optimiser of a grid, whose parts have rates of their own; None for Trainer's."""
    if not isinstance(trained, GridModel):
        return None
    # Under the warm-up and the cosine a rate sums to half its peak times the steps.
    code_rate = 2 * data.code_distance / len(data.steps)
    return torch.optim.AdamW(trained.parameter_groups(data.learning_rate, code_rate), weight_decay=0.0)


def train(
    trained: PeftModel | BlockWeights | GridModel, data: TrainingData, device: torch.device, workspace: Path, progress: Progress
) -> History:
    """Train the parameters that require gradients in place, resuming from the last complete checkpoint in `workspace`.

    Returns:
        For every step "step", its "loss" in nats per token, and the number of learned "tokens".

    Raises:
        NumericalError: the loss became NaN or infinity.
        StorageError: a checkpoint could not be saved.
    """
    dtype = next(trained.parameters()).dtype  # the embedding's, which is never trained
    in_bfloat16 = dtype == torch.bfloat16 or (dtype == torch.float32 and takes_bfloat16(device, data.precision))
    arguments = TrainingArguments(
        output_dir=str(workspace), max_steps=len(data.steps), per_device_train_batch_size=1, learning_rate=data.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=max(1, round(WARM_UP * len(data.steps))), weight_decay=0.0,
        max_grad_norm=LARGEST_NORM, save_strategy="steps", save_steps=data.checkpoint_steps,
        save_total_limit=KEPT_CHECKPOINTS, logging_strategy="no", report_to=[], disable_tqdm=True, seed=data.seed,
        use_cpu=device.type == "cpu", fp16=dtype == torch.float16 and device.type == "cuda",
        remove_unused_columns=False, dataloader_pin_memory=False, average_tokens_across_devices=False,
    )  # fmt: skip
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and the data loader warn about settings that are intended here
        trainer = (DealtWeightsTrainer if isinstance(trained, DealtWeights) else StepTrainer)(
            model=trained, args=arguments, train_dataset=Steps(len(data.steps)), callbacks=[_Watch(progress)],
            optimizers=(_optimizer(trained, data), None),
            data_collator=lambda items: {"batches": collate(data, items[0])},
        )  # fmt: skip
        trainer.in_bfloat16 = in_bfloat16
        trainer.remove_callback(PrinterCallback)
        if distributed.count() > 1:  # without DistributedDataParallel: its sums depend on the number of ranks
            trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
        last = distributed.from_first(lambda: last_checkpoint(workspace))
        # Weights that are put together and freed again would leave holes as large as all of them.
        with nullcontext() if isinstance(trained, DealtWeights) else freed_memory_kept():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    return [entry for entry in trainer.state.log_history if "tokens" in entry]
