"""transformers' Trainer for steps of micro-batches that are decided beforehand and dealt to the ranks.

One data item is a whole optimiser step. Its micro-batches are weighted by their tokens, which gives the gradient of the mean
over all tokens of the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import Trainer

from compresskit import distributed
from compresskit.checkpoint.whole_files import sync, write_whole_json
from compresskit.errors import NumericalError, StorageError
from compresskit.machine.precision import takes_bfloat16
from compresskit.recovery.training.batches import TrainingData, collate
from compresskit.recovery.training.checkpoints import COMPLETE, hashes
from compresskit.recovery.training.distillation import distillation_losses
from compresskit.recovery.training.sharing import SharedGradients


class Steps(torch.utils.data.Dataset[int]):
    """Numbers of the optimiser steps; the collator builds their tensors on demand."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def losses_of(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Losses in nats: logits (samples, kept, vocabulary) -> one per learned position, (positions,)."""
    # A single row has only learned logits, so nothing of their size is copied.
    said = logits[0] if len(logits) == 1 else logits[batch["rows"], batch["columns"]]
    if "top" in batch:
        return distillation_losses(said, batch["top"], batch["values"])
    return torch.nn.functional.cross_entropy(said.float(), batch["targets"], reduction="none")


def _summed_loss(network: Any, batch: Mapping[str, Tensor], in_bfloat16: bool) -> Tensor:
    """Sum of a micro-batch's losses, a number; `in_bfloat16`: whether matrix products are."""
    with torch.autocast(batch["tokens"].device.type, torch.bfloat16, in_bfloat16):
        texts = {"input_ids": batch["tokens"], "position_ids": batch.get("positions")}
        logits = network(**texts, logits_to_keep=batch["kept"], use_cache=False).logits
        return losses_of(logits, batch).sum()


@torch.no_grad()
def mean_loss(trained: nn.Module, data: TrainingData, device: torch.device) -> float:
    """Mean loss over all learned positions, in nats; NaN without samples. Products are those of training."""
    own: list[float] = []
    in_bfloat16, positions = takes_bfloat16(device, data.precision), 0
    for step in distributed.own(len(data.steps)):
        own.append(0.0)
        for made in collate(data, step):
            batch = {name: value.to(device) for name, value in made.items()}
            own[-1] += float(_summed_loss(trained, batch, in_bfloat16))
            positions += len(batch["rows"])
    positions = distributed.total_of(positions)
    return math.fsum(distributed.in_order(own, len(data.steps))) / positions if positions else math.nan


class StepTrainer(Trainer):  # type: ignore[misc]
    """Runs steps of micro-batches in the given order; records losses in full precision in the state's history."""

    in_bfloat16 = False
    """Whether matrix products use bfloat16; accelerate's own mode would widen all logits, most of the memory, to float32."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradients of the mean loss over all learned tokens of the step."""
        model.train()
        batches = self._prepare_inputs(inputs)["batches"]
        positions = sum(len(batch["rows"]) for batch in batches)
        own: list[Tensor] = []
        gradients = self.gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
        for first in range(0, len(batches), distributed.count()):
            together = batches[first : first + distributed.count()]
            if distributed.rank() < len(together):
                own.append(self.backpropagate(model, together[distributed.rank()], positions))
            else:
                self.join(model, together[0], positions)
            gradients.add(len(together))
        gradients.set()
        total = torch.zeros((), device=self.args.device)
        for loss in distributed.in_order(own, len(batches)):
            total += loss
        if not bool(total.isfinite()):
            raise NumericalError(f"training step {self.state.global_step + 1}: the loss is {float(total)}; lower --learning-rate")
        self.state.log_history.append({"step": self.state.global_step + 1, "loss": float(total), "tokens": positions})
        return total

    def gradients(self, parameters: Sequence[Tensor]) -> SharedGradients:
        """What adds up the gradients of a step."""
        return SharedGradients(parameters)

    def join(self, model: Any, batch: Mapping[str, Tensor], positions: int) -> None:
        """What a rank without a micro-batch does while others run theirs."""

    def backpropagate(self, model: Any, batch: Mapping[str, Tensor], positions: int, weight: float = 1.0) -> Tensor:
        """Add `weight` times a micro-batch's gradients of its losses' sum divided by `positions`; returns that."""
        with self.compute_loss_context_manager():
            loss = _summed_loss(model, batch, self.in_bfloat16) / positions
        self.accelerator.backward(loss if weight == 1 else weight * loss)
        return loss.detach()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The steps; every rank gets all, where the stock loader would deal them."""
        if distributed.count() == 1:
            loader: DataLoader[Any] = super().get_train_dataloader()
            return loader
        return DataLoader(self.train_dataset, sampler=SequentialSampler(self.train_dataset), collate_fn=self.data_collator)

    def _get_train_sampler(self, *_: Any) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*arguments, **named)
            distributed.wait()
            if not distributed.is_first():
                return
            for path in folder.rglob("*"):
                sync(path)
            write_whole_json(folder / COMPLETE, hashes(folder))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise StorageError(f"{folder}: the training cannot be saved ({reason}); free some space") from error
