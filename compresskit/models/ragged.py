"""Load ragged checkpoints without `trust_remote_code` by registering their classes with transformers' Auto classes.

    import compresskit
    compresskit.register()

vLLM calls `register` by way of vllm_plugin.py. The classes come from the same text that `prune`
writes into the output folder (layouts.py), so they have a single definition.
"""

from __future__ import annotations

import hashlib
import sys
import types
from typing import TYPE_CHECKING

from compresskit.machine.device import Where
from compresskit.models.architectures import ARCHITECTURES, RAGGED_PREFIX, Architecture
from compresskit.models.layouts import CONFIGURATION_FILE, MODELING_FILE, can_be_ragged, class_names, generated_files
from compresskit.models.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def register() -> None:
    """Register every `compresskit_*` model type with AutoConfig, AutoModel and AutoModelForCausalLM. Can be called again."""
    for family, architecture in ARCHITECTURES.items():
        if can_be_ragged(architecture):
            _register(family, architecture)


def _register(family: str, architecture: Architecture) -> None:
    """Register the ragged type of one family, or of one derived structure."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    files, causal_class, config_class = generated_files(family, architecture)
    package = f"compresskit_{family}_ragged"
    if architecture.derived:  # two checkpoints of a family may differ in what their files resize
        package += "_" + hashlib.sha256("".join(files.values()).encode()).hexdigest()[:8]
    _module(package, "", "")
    configuration = _module(package, CONFIGURATION_FILE, files[CONFIGURATION_FILE])
    modeling = _module(package, MODELING_FILE, files[MODELING_FILE])
    config = getattr(configuration, config_class)
    AutoConfig.register(RAGGED_PREFIX + family, config, exist_ok=True)
    AutoModel.register(config, getattr(modeling, f"Compresskit{class_names(family, architecture)['base_class']}"), exist_ok=True)
    whole = AutoModelForImageTextToText if causal_class.endswith("ForConditionalGeneration") else AutoModelForCausalLM
    whole.register(config, getattr(modeling, causal_class), exist_ok=True)


def load_stock(model: Model, where: Where) -> PreTrainedModel:
    """Load the whole model with transformers.

    Ragged checkpoints use the registered classes; code in their folder is never run.

    Returns:
        The model with its adapter, in evaluation mode.

    Raises:
        RequestError: the model has an adapter, but peft is not installed.
    """
    from compresskit.checkpoint.stock import add_adapter, load_whole

    if model.ragged:
        register()
        if model.architecture.derived:
            _register(model.family, model.architecture)
    own_code = where.trust_remote_code and not model.ragged
    network = load_whole(model.checkpoint.folder, where.dtype, own_code, made=model.checkpoint)
    if model.adapter is not None:
        add_adapter(network, model.adapter.folder, model.adapter.store if model.adapter.is_made else None)
    return network.to(where.device)


def _module(package: str, file: str, text: str) -> types.ModuleType:
    """Create the module of a generated file in an in-memory package."""
    name = f"{package}.{file.removesuffix('.py')}" if file else package
    if name not in sys.modules:
        module = types.ModuleType(name)
        module.__package__ = package
        module.__path__ = []
        sys.modules[name] = module
        exec(compile(text, name, "exec"), module.__dict__)  # noqa: S102 (our own text, see layouts.py)
    return sys.modules[name]
