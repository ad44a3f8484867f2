"""Load a whole model with transformers, for work that needs all blocks in memory."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from compresskit.checkpoint.foreign_code import FOREIGN_CODE, IMPLEMENTATIONS
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.small_files import first_line, read_json
from compresskit.errors import CheckpointError, RequestError

ADAPTER_CONFIG = "adapter_config.json"
GENERATING = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""How the names of classes end that generate text."""
PLAIN_LORA = (
    "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha",
    "r", "rank_pattern", "target_modules", "task_type", "use_rslora",
)  # fmt: skip
"""Keys of adapter_config.json that say where the factors go and how they are scaled. Others name modules to import."""


def stock_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a folder's configuration as transformers does, without the keys that make it fetch code.

    Returns:
        The configuration of a class of transformers, or of the folder's own code where that is allowed.

    Raises:
        CheckpointError: transformers does not take it.
    """
    try:
        config = with_usual_code(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))
    except Exception as error:  # transformers raises errors of every kind
        reason = f"transformers does not take it ({first_line(error)})"
        raise CheckpointError(f"{folder / 'config.json'}: {reason}; restore the file from its source") from error
    if "float8" in str(config.dtype):  # torch makes no network in it; such weights are read as bfloat16
        config.dtype = torch.bfloat16
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """The class that makes a text-generating network of a configuration: the one that it names, else an Auto class.

    Returns:
        A class of transformers that `architectures` names and that takes this configuration; else AutoModelForCausalLM, or
        AutoModelForImageTextToText for configurations that only the latter takes.
    """
    names = getattr(config, "architectures", None) or []
    kind: Any = getattr(transformers, str(names[0]), None) if names else None
    generates = inspect.isclass(kind) and kind.__name__.endswith(GENERATING) and issubclass(kind, PreTrainedModel)
    if generates and kind.config_class is type(config):
        return kind
    only_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if only_images else AutoModelForCausalLM


def with_usual_code(config: PreTrainedConfig) -> PreTrainedConfig:
    """Set a configuration back to the code that transformers uses by itself, in place; returns it."""
    for name in IMPLEMENTATIONS:
        setattr(config, name, None)  # its setter does the same to the configurations inside it
    for name in FOREIGN_CODE.difference(f"{each}_internal" for each in IMPLEMENTATIONS):
        vars(config).pop(name, None)
    return config


def load_whole(
    folder: Path,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    made: Checkpoint | None = None,
) -> PreTrainedModel:
    """Load a folder's causal language model on the CPU in evaluation mode; prints nothing on standard output.

    `made`: the folder opened as a dense checkpoint whose tensors are made on reading. The model then gets these: transformers
    misreads some blocks of FP8, and fetches kernels for others.

    Returns:
        The model, from safetensors, without an adapter.

    Raises:
        CheckpointError: an adapter lies beside the weights.
    """
    if (folder / ADAPTER_CONFIG).exists():  # transformers would add it, and nothing else here would
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: is beside a whole model; move the adapter into a folder of its own")
    with quiet():
        special: dict[str, Any] = {"gguf_file": gguf_file, "trust_remote_code": False}
        if gguf_file is None:
            config = stock_config(folder, trust_remote_code)
            special = {"config": config, "use_safetensors": True, "trust_remote_code": trust_remote_code}
            own_code = trust_remote_code and hasattr(config, "auto_map")  # its class is found beside the weights alone
            if made is not None and made.stored_as and not own_code:
                vars(config).pop("quantization_config", None)
                special["state_dict"] = {name: made.read(name) for name in made.tensors}
        kind = model_class(special["config"]) if gguf_file is None else AutoModelForCausalLM
        network: PreTrainedModel = kind.from_pretrained(None if "state_dict" in special else folder, dtype=dtype, **special)
    return network.eval()


def add_adapter(network: PreTrainedModel, folder: Path, made: Checkpoint | None = None) -> None:
    """Attach a plain LoRA adapter in place.

    `made`: the adapter opened, where its tensors or its configuration are made from what the folder holds.

    Raises:
        RequestError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise RequestError(f"{folder}: running an adapter takes peft; pip install 'compresskit[peft]'")
    from peft import LoraConfig

    found = made.config if made else read_json(folder / ADAPTER_CONFIG)
    config = LoraConfig(**{key: found[key] for key in PLAIN_LORA if key in found})
    tensors = {name: made.read(name) for name in made.tensors} if made else None
    with quiet():
        network.load_adapter(None if made else str(folder), peft_config=config, adapter_state_dict=tensors)


def next_logits(network: nn.Module, tokens: Tensor, cache: Any, **options: Any) -> tuple[Tensor, Any]:
    """Run more tokens (batch, length) after those in the cache (None at the start).

    transformers 5.24 renamed the argument and the output `past_key_values` to `cache`.

    Returns:
        (logits (batch, length, vocabulary), or fewer positions if the options say so; the cache including these tokens).
    """
    name = "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"
    output = network(input_ids=tokens, use_cache=True, **{name: cache}, **options)
    return output.logits, getattr(output, name)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' progress bars and warnings, and what bitsandbytes lacks; prints go to standard error."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    library = getLogger("bitsandbytes")  # its kernels for a CPU are a package of their own, and only faster
    library_level = library.level
    library.setLevel(ERROR)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        library.setLevel(library_level)
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
