"""Train low-rank updates of all linears in the blocks, or all their weights, with transformers' Trainer, resumably.

The whole stock model is in memory in plain form (meta.py). Dense, ragged and low-bit sources train alike; low-bit weights
are unpacked. One data item is a whole optimiser step. Its micro-batches are weighted by their tokens, which gives the
gradient of the mean over all tokens of the step.

LoRA: arXiv 2106.09685, W + B A with lora_alpha = rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from compresskit import distributed
from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.stock import quiet
from compresskit.checkpoint.whole_files import NEW, sync, write_whole_json
from compresskit.errors import CheckpointError, NumericalError, StorageError
from compresskit.formats.peft import Adapter, factor_names
from compresskit.machine.device import Where
from compresskit.machine.memory import freed_memory_kept, release_freed_memory
from compresskit.machine.precision import takes_bfloat16
from compresskit.models import meta
from compresskit.models.model import Model
from compresskit.recovery.training.batches import TrainingData, collate
from compresskit.recovery.training.distillation import distillation_losses
from compresskit.recovery.training.sharing import SharedGradients

WARM_UP = 0.05
"""Share of the steps for the learning rate's warm-up."""
KEPT_CHECKPOINTS = 2
"""A kill or the disk may damage the newest checkpoint; the one before it is complete."""
COMPLETE = "complete.json"
"""Record of the SHA-256 of a complete checkpoint's files."""
CHECKPOINTS = "checkpoint-*"
RELEASE_STEPS = 5
"""Number of steps between releases of freed memory."""
LARGEST_NORM = 1.0
"""Gradient clipping norm, Trainer's default."""

PLAIN = "plain"
"""A model type that peft does not know."""

Progress = Callable[[int, int], None]
"""Called with (steps done, total steps)."""


def whole_network(model: Model, where: Where, gradient_checkpointing: bool = False) -> PreTrainedModel:
    """The model in plain form with all weights, without its adapter; `gradient_checkpointing` computes activations twice."""
    network = meta.build(model, where.trust_remote_code)
    for prefix in ("", *(model.block_name(index) for index in range(model.block_count))):
        meta.fill(model, network, prefix, where.device, where.dtype)
    for part in meta.towers(model, network):  # images are not trained on, and their towers not read
        network.set_submodule(part.removesuffix("."), nn.Identity())
    network.to(where.device)  # the buffers
    network.name_or_path = str(model.checkpoint.folder)
    if gradient_checkpointing:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # transformers 5.24 renamed it; earlier versions know only this name
            network.gradient_checkpointing_enable()
        network.enable_input_require_grads()
    return network


def add_factors(network: PreTrainedModel, ranks: Mapping[str, int], start: Adapter | None, seed: int) -> PeftModel:
    """Add low-rank pairs to the named linears, initialised from the adapter if given, else to no change."""
    common = max(ranks.values())
    others = {name: rank for name, rank in ranks.items() if rank != common}
    torch.manual_seed(seed)
    configuration = LoraConfig(
        r=common, lora_alpha=common, target_modules=list(ranks), rank_pattern=others, alpha_pattern=others, task_type="CAUSAL_LM"
    )
    with quiet(), warnings.catch_warnings(), _of_no_known_type(network):
        warnings.simplefilter("ignore", FutureWarning)  # peft uses a transformers name that 5.24 replaced
        trained = get_peft_model(network, configuration)
    if start is not None:
        for name in start.names:
            first, second = (start.store.read(each).float() for each in factor_names(name))
            pair = trained.base_model.model.get_submodule(name)
            with torch.no_grad():
                pair.lora_A["default"].weight.copy_(first)
                pair.lora_B["default"].weight.copy_(start.scaling(name) * second)
    return trained


@contextmanager
def _of_no_known_type(network: PreTrainedModel) -> Iterator[None]:
    """Hide the model type: for some, peft renames the targets to the 3-D experts of the stock network; ours has linears."""
    kept = network.config.model_type
    network.config.model_type = PLAIN
    try:
        yield
    finally:
        network.config.model_type = kept


def factors(trained: PeftModel, names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A (rank, in), B (out, rank)) of every linear, float32 on the CPU."""
    found = {}
    for name in names:
        pair = trained.base_model.model.get_submodule(name)
        found[name] = tuple(pair.get_submodule(f"lora_{part}.default").weight.detach().float().cpu() for part in "AB")
    return found


class BlockWeights(nn.Module):
    """A network in which only the blocks' weights are trained and saved in training checkpoints."""

    _keys_to_ignore_on_save = None
    """Trainer reads this from any model that it resumes."""

    def __init__(self, network: PreTrainedModel, blocks: str):
        """`blocks` is the name of the module that holds the blocks."""
        super().__init__()
        self.network = network
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(f"{blocks}."))

    def forward(self, **inputs: Any) -> Any:
        """Run the network."""
        return self.network(**inputs)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Trained weights only; the rest is read from the source again."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def block_weights(trained: BlockWeights) -> dict[str, Tensor]:
    """Trained weights by plain name, float32 on the CPU."""
    return {name: p.detach().float().cpu() for name, p in trained.network.named_parameters() if p.requires_grad}


class _Steps(torch.utils.data.Dataset[int]):
    """Numbers of the optimiser steps; the collator builds their tensors on demand."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


def _losses(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Losses in nats: logits (samples, kept, vocabulary) -> one per learned position, (positions,)."""
    # A single row has only learned logits, so nothing of their size is copied.
    said = logits[0] if len(logits) == 1 else logits[batch["rows"], batch["columns"]]
    if "top" in batch:
        return distillation_losses(said, batch["top"], batch["values"])
    return torch.nn.functional.cross_entropy(said.float(), batch["targets"], reduction="none")


class _Trainer(Trainer):  # type: ignore[misc]
    """Runs steps of micro-batches in the given order; records losses in full precision in the state's history."""

    in_bfloat16 = False
    """Whether matrix products use bfloat16; accelerate's own mode would widen all logits, most of the memory, to float32."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Compute the gradients of the mean loss over all learned tokens of the step."""
        model.train()
        batches = self._prepare_inputs(inputs)["batches"]
        positions = sum(len(batch["rows"]) for batch in batches)
        own: list[Tensor] = []
        gradients = SharedGradients([parameter for parameter in model.parameters() if parameter.requires_grad])
        for first in range(0, len(batches), distributed.count()):
            together = batches[first : first + distributed.count()]
            if distributed.rank() < len(together):
                own.append(self._backpropagate(model, together[distributed.rank()], positions))
            gradients.add(len(together))
        gradients.set()
        total = torch.zeros((), device=self.args.device)
        for loss in distributed.in_order(own, len(batches)):
            total += loss
        if not bool(total.isfinite()):
            raise NumericalError(f"training step {self.state.global_step + 1}: the loss is {float(total)}; lower --learning-rate")
        self.state.log_history.append({"step": self.state.global_step + 1, "loss": float(total), "tokens": positions})
        return total

    def _backpropagate(self, model: Any, batch: Mapping[str, Tensor], positions: int) -> Tensor:
        """Add a micro-batch's gradients of its losses' sum divided by `positions`; returns that."""
        with self.compute_loss_context_manager(), torch.autocast(self.args.device.type, torch.bfloat16, self.in_bfloat16):
            texts = {"input_ids": batch["tokens"], "position_ids": batch.get("positions")}
            logits = model(**texts, logits_to_keep=batch["kept"], use_cache=False).logits
            loss = _losses(logits, batch).sum() / positions
        self.accelerator.backward(loss)
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
            write_whole_json(folder / COMPLETE, _hashes(folder))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise StorageError(f"{folder}: the training cannot be saved ({reason}); free some space") from error


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


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were saved, None if there is none."""
    found = [path for path in folder.glob(CHECKPOINTS) if (path / COMPLETE).is_file()]
    newest_first = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in newest_first if _is_whole(path)), None)


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files, by path inside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (COMPLETE, COMPLETE + NEW))
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def _is_whole(folder: Path) -> bool:
    try:
        return read_json(folder / COMPLETE) == _hashes(folder)
    except CheckpointError:  # the record itself is damaged
        return False


def train(
    trained: PeftModel | BlockWeights, data: TrainingData, device: torch.device, workspace: Path, progress: Progress
) -> list[dict[str, float]]:
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
        trainer = _Trainer(
            model=trained, args=arguments, train_dataset=_Steps(len(data.steps)), callbacks=[_Watch(progress)],
            data_collator=lambda items: {"batches": collate(data, items[0])},
        )  # fmt: skip
        trainer.in_bfloat16 = in_bfloat16
        trainer.remove_callback(PrinterCallback)
        if distributed.count() > 1:  # without DistributedDataParallel: its sums depend on the number of ranks
            trainer.accelerator.prepare_model = partial(trainer.accelerator.prepare_model, evaluation_mode=True)
        last = distributed.from_first(lambda: last_checkpoint(workspace))
        with freed_memory_kept():
            trainer.train(resume_from_checkpoint=str(last) if last else None)
    return [entry for entry in trainer.state.log_history if "tokens" in entry]
