"""What vLLM calls through the entry point `vllm.general_plugins`: ragged checkpoints run without `--trust-remote-code`.

vLLM looks for an architecture in its own registry, then in transformers, then in the `auto_map` of config.json, where it runs
the folder's code and asks for the flag. The classes that `register` gives to transformers are on none of these ways. So each
architecture is entered into vLLM's registry, with the class of vLLM's own backend for models of transformers. That backend
builds the network by `AutoModel.from_config`, which knows our classes. The architectures of DeciLM are vLLM's own already.

Source: vLLM 0.32, vllm/model_executor/models/registry.py (`_try_resolve_transformers`, `register_model`).
"""

from __future__ import annotations

from compresskit.models.architectures import ARCHITECTURES
from compresskit.models.layouts import DECI_FAMILIES, can_be_ragged, generated_files
from compresskit.models.ragged import register

BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"
"""Imported by vLLM when it is needed."""


def register_in_vllm() -> None:
    """Register every `compresskit_*` model type with transformers and every ragged architecture with vLLM.

    Can be called again; vLLM calls it once in every process.
    """
    from vllm import ModelRegistry

    register()
    for architecture in ragged_architectures():
        ModelRegistry.register_model(architecture, BACKEND)


def ragged_architectures() -> list[str]:
    """Names in `architectures` of config.json that vLLM does not know by itself."""
    families = {name: row for name, row in ARCHITECTURES.items() if can_be_ragged(row) and name not in DECI_FAMILIES}
    return [generated_files(name, row)[1] for name, row in families.items()]
