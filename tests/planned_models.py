"""Checkpoints without weights: a configuration of transformers, and the shapes of the tensors that its network has."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedConfig

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.models.network import build_network


def planned(config: PreTrainedConfig) -> Checkpoint:
    """A checkpoint of bfloat16 tensors under the network's own names, as if it was read; no file of it exists."""
    network = build_network(config)
    if not getattr(config, "architectures", None):
        config.architectures = [type(network).__name__]
    left_out = set(network.all_tied_weights_keys)
    specs = {
        name: TensorSpec(name, "BF16", tuple(tensor.shape))
        for name, tensor in network.state_dict().items()
        if name not in left_out
    }
    return Checkpoint(Path("/no/such/folder"), config.to_dict(), specs, {})
