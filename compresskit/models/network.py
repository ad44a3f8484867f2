"""Build the stock network of a configuration: which class it is, and its skeleton on the meta device."""

from __future__ import annotations

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from compresskit.checkpoint.foreign_code import without_foreign_code
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.stock import model_class, stock_config
from compresskit.errors import CheckpointError, UnsupportedArchitecture
from compresskit.models.architectures import RAGGED_PREFIX

META = torch.device("meta")
LARGEST_BUFFER = 1 << 24
"""Elements of the largest tensor that is made while a network is built."""
RANDOM = (Tensor.normal_, Tensor.uniform_)
"""What fills weights with random numbers in place; a millisecond a weight even where there is nothing to fill."""
OURS = ("block_configs", "auto_map", "architectures", "model_type", "compresskit_ffn")


def configuration_of(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Make the configuration that a checkpoint's config.json describes; of a ragged one, the plain family's.

    Returns:
        A configuration of transformers, or of the folder's own code where that is allowed.

    Raises:
        CheckpointError: transformers does not take it.
    """
    raw = checkpoint.config
    model_type = str(raw.get("model_type"))
    family = model_type.removeprefix(RAGGED_PREFIX)
    if family == model_type and trust_remote_code and "auto_map" in raw:
        return stock_config(checkpoint.folder, trust_remote_code)
    kept = {key: value for key, value in without_foreign_code(raw).items() if family == model_type or key not in OURS}
    kept = {key: value for key, value in kept.items() if key not in ("quantization_config", "auto_map")} | {"model_type": family}
    # A folder of its own: the checkpoint may be planned and not written yet, or name code that must not run.
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(kept))
        try:
            return stock_config(Path(folder))
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(folder, str(checkpoint.folder))) from error


def build_network(
    config: PreTrainedConfig, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build the stock network, of the class `stock.model_class`. Buffers are those of a network that is loaded in `dtype`.

    Returns:
        The network in evaluation mode: parameters on the meta device, buffers with their values on the CPU.
    """
    kind = model_class(config)
    network: PreTrainedModel
    with init_empty_weights(include_buffers=False), _LargeOnMeta():
        if issubclass(kind, PreTrainedModel):
            network = kind._from_config(config, dtype=dtype)
        else:
            network = kind.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    if dtype != torch.float32 and not network.is_custom_code():
        _compute_buffers(network)
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device=META), requires_grad=False)
    return network.eval()


def _compute_buffers(network: Any) -> None:
    """Compute the buffers that no file stores as transformers does after loading: not in the dtype of the weights."""
    for module in network.modules():
        module._is_hf_initialized = False
    with _LargeOnMeta():
        network.initialize_weights()


def check_decoder(config: PreTrainedConfig, file: Path) -> None:
    """Raise UnsupportedArchitecture unless a configuration's network generates text by a decoder alone."""
    kind = f"{file}: {config.model_type}"
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedArchitecture(f"{kind} is an encoder-decoder; only decoders are compressed")
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True):
        raise UnsupportedArchitecture(f"{kind} is an encoder (is_decoder is false); only decoders are compressed")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    if not known and not hasattr(config, "auto_map") and model_class(config) is AutoModelForCausalLM:
        raise UnsupportedArchitecture(f"{kind} generates no text in transformers; point to a causal language model")


class _LargeOnMeta(TorchFunctionMode):
    """Makes large empty tensors on the meta device: they become parameters, whose values are not needed, nor drawn."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in RANDOM and args[0].is_meta:
            return args[0]
        if func in (torch.empty, torch.zeros, torch.ones, torch.randn, torch.rand) and kwargs.get("device") is None:
            sizes = args[0] if args and isinstance(args[0], (tuple, list)) else args
            if all(isinstance(size, int) for size in sizes) and math.prod(sizes) > LARGEST_BUFFER:
                return func(*args, **{**kwargs, "device": META})
        return func(*args, **kwargs)
