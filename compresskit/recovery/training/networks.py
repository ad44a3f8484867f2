"""The networks that are trained: low-rank updates of all linears in the blocks, or all the blocks' weights.

The whole stock model is in memory in plain form (meta.py). Dense, ragged and low-bit sources train alike; low-bit weights
are unpacked.

LoRA: arXiv 2106.09685, W + B A with lora_alpha = rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.checkpoint.stock import quiet
from compresskit.formats.peft import Adapter, factor_names
from compresskit.machine import sharding
from compresskit.machine.device import Where
from compresskit.models import meta
from compresskit.models.model import Model

PLAIN = "plain"
"""A model type that peft does not know."""


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


class PartlyTrained(nn.Module):
    """A network of which only the parameters that require gradients are saved in training checkpoints."""

    _keys_to_ignore_on_save = None
    """Trainer reads this from any model that it resumes."""

    def __init__(self, network: PreTrainedModel):
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> Any:
        """Run the network."""
        return self.network(**inputs)

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Trained parameters only; the rest is read from the source again."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


class BlockWeights(PartlyTrained):
    """A network in which only the blocks' weights are trained."""

    def __init__(self, network: PreTrainedModel, blocks: str):
        """`blocks` is the name of the module that holds the blocks."""
        super().__init__(network)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(name.startswith(f"{blocks}."))


def block_weights(trained: BlockWeights) -> dict[str, Tensor]:
    """Trained weights by plain name, float32 on the first rank's CPU; others have their shapes."""
    named = trained.network.named_parameters()
    return {name: sharding.whole_on_first(p.detach()).float() for name, p in named if p.requires_grad}
