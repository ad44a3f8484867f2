"""Store per-block FFN widths so that stock tools can load them.

uniform  every block has the same width: the plain architecture with that width in its configuration.
padded   the plain architecture at the largest width; narrower blocks are padded with zeros, which have no effect.
ragged   the real widths, plus two small generated files that subclass the stock classes and resize their linears;
         `config.json` keeps the source's keys and adds `block_configs`, in the form that vLLM's own
         DeciLM code reads for llama and mistral.

The generated files come from the two texts below and from the table of families. Nothing of a checkpoint becomes code: files
and class names that a ragged source brings are written anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from compresskit.checkpoint.foreign_code import without_foreign_code
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.models.architectures import ARCHITECTURES, RAGGED_PREFIX, Architecture, Sublayer
from compresskit.models.model import Model, with_config_value

Layout = Literal["ragged", "padded"]
Widths = list[list[int]]
"""Widths per block, then per group of the block (`Model.ffn_groups`)."""

DECI_FAMILIES = ("llama", "mistral")
"""Families whose ragged checkpoints vLLM runs with its own DeciLM code."""
CONFIGURATION_FILE = "configuration_compresskit.py"
MODELING_FILE = "modeling_compresskit.py"
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3", "gemma": "Gemma",
    "gemma2": "Gemma2", "gemma3_text": "Gemma3", "phi": "Phi", "phi3": "Phi3", "opt": "OPT", "gpt2": "GPT2",
}  # fmt: skip
"""How the names of transformers' classes begin; its own tables cannot be read without importing torch."""

_CONFIGURATION = '''\
"""Configuration of a {family} model whose blocks have FFNs of different widths. Written by compresskit."""

from transformers import {config_class}


class Attributes(dict):
    """A JSON object whose keys are also attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def with_attributes(value):
    if isinstance(value, dict):
        return Attributes({{key: with_attributes(item) for key, item in value.items()}})
    return [with_attributes(item) for item in value] if isinstance(value, list) else value


class Compresskit{config_class}({config_class}):
    model_type = "{model_type}"

    def __init__(self, block_configs=None, **kwargs):
        super().__init__(**kwargs)
        self.block_configs = with_attributes(block_configs or [])
'''

_RESIZE = """\
def resize(model, config):
    for block, block_config in zip(model.get_submodule(BLOCKS), config.block_configs):
        width = block_config["ffn"]["intermediate_size"]
        for name in IN_PROJECTIONS:
            block.set_submodule(name, with_shape(block.get_submodule(name), config.hidden_size, FUSED * width))
        block.set_submodule(OUT_PROJECTION, with_shape(block.get_submodule(OUT_PROJECTION), width, config.hidden_size))


"""
_RESIZE_DERIVED = """\
def resize(model, config):
    for block, block_config in zip(model.get_submodule(BLOCKS), config.block_configs):
        width = block_config["ffn"]["intermediate_size"]
        if width is None:
            continue
        for name in IN_PROJECTIONS:
            linear = block.get_submodule(name)
            block.set_submodule(name, with_shape(linear, linear.in_features, FUSED * width))
        linear = block.get_submodule(OUT_PROJECTION)
        block.set_submodule(OUT_PROJECTION, with_shape(linear, width, linear.out_features))


"""
"""Of derived families: some blocks may have no feed-forward network."""

_CLASS_START = "    config_class = Compresskit{config_class}\n"
_AS_STOCK = """
    @classmethod
    def is_custom_code(cls):
        return False  # so that transformers computes the buffers that no file stores, as it does in its own classes
"""

_MODELING = (
    '''\
"""A {family} model whose blocks have FFNs of different widths. Written by compresskit."""

from torch import nn
from transformers import {base_class}, {causal_class}

from .configuration_compresskit import Compresskit{config_class}

BLOCKS = "{blocks}"
IN_PROJECTIONS = {in_projections!r}
OUT_PROJECTION = "{out_projection}"
FUSED = {fused}


def with_shape(linear, inputs, outputs):
    """A new module of the same kind with another shape."""
    if isinstance(linear, nn.Linear):
        return nn.Linear(inputs, outputs, linear.bias is not None, device=linear.weight.device, dtype=linear.weight.dtype)
    return type(linear)(outputs, inputs).to(device=linear.weight.device, dtype=linear.weight.dtype)


'''
    + _RESIZE
    + """class Compresskit{base_class}({base_class}):
    config_class = Compresskit{config_class}

    def __init__(self, config):
        super().__init__(config)
        resize(self, config)


class {architecture}({causal_class}):
    config_class = Compresskit{config_class}

    def __init__(self, config):
        super().__init__(config)
        resize(self.base_model, config)
"""
)


def is_uniform(model: Model, widths: Widths) -> bool:
    """Whether one configuration describes the widths: all groups that share a key have the width that it states."""
    # Without a key that states them, only unchanged widths are.
    by_key: dict[str, set[float]] = {}
    for index, block in enumerate(widths):
        for group, width in zip(model.ffn_groups(index), block, strict=True):
            if not group.width_key and width != group.width:
                return False
            if group.width_key:
                by_key.setdefault(group.width_key, set()).add(width / group.multiple)
    return all(len(found) == 1 and next(iter(found)).is_integer() for found in by_key.values())


def check_keys(model: Model) -> None:
    """Refuse models whose blocks cannot all have another width: no key of config.json states it.

    Raises:
        UnsupportedArchitecture: a network's width has no key.
    """
    for index in range(model.block_count):
        for group in model.ffn_groups(index):
            if not group.width_key:
                ragged = "pass --layout ragged" if can_be_ragged(model.architecture) else "quantize it instead"
                raise UnsupportedArchitecture(
                    f"{model.family}: no key of config.json states the width of {group.members[0].out_projection}; {ragged}"
                )


def check_ragged(model: Model) -> None:
    """Refuse families that have no ragged layout.

    On loading, transformers converts tensor names and shapes of some families (experts, GPT-NeoX's head) based on the model
    type. It does not do so for our own model type and would silently fill these tensors with random numbers.

    Raises:
        UnsupportedArchitecture: the model belongs to such a family.
    """
    if not can_be_ragged(model.architecture):
        raise UnsupportedArchitecture(
            f"{model.family}: stock tools cannot load a width of its own for each block; "
            "pass --allocation uniform, or --layout padded"
        )


def can_be_ragged(architecture: Architecture) -> bool:
    """Whether the family stores its tensors under its module names, with at most one feed-forward network a block."""
    if not architecture.derived:
        return not (architecture.experts or architecture.renames or architecture.outer_renames)
    alike = all(plain == stored for kind in architecture.kinds for plain, stored in kind.names)
    alike = alike and all(plain == stored for plain, stored in architecture.outer_names)
    networks = {kind.ffns for kind in architecture.kinds if kind.ffns}
    single = len({tuple(replace(ffn, width_key="") for ffn in ffns) for ffns in networks}) == 1
    single = single and all(len(ffns) == 1 and "{expert}" not in ffns[0].out_projection for ffns in networks)
    classes = architecture.classes
    named = bool(classes[0]) and classes[1] != classes[2] and "." in architecture.blocks
    return alike and single and named and not architecture.converted and all(not kind.packed for kind in architecture.kinds)


def stored_widths(model: Model, widths: Widths, layout: Layout) -> Widths:
    """Widths on disk: the real ones, or for `padded` the largest among groups that share a configuration key."""
    # Shared experts of twice the width round to another width than twice that of one expert: a zero channel evens that out.
    evened = layout == "ragged" and not can_be_ragged(model.architecture)
    if (layout == "ragged" and not evened) or is_uniform(model, widths):
        return widths
    largest: dict[str, int] = {}
    for index, block in enumerate(widths):
        for group, width in zip(model.ffn_groups(index), block, strict=True):
            unit = -(-width // group.multiple)
            largest[group.width_key] = max(unit, largest.get(group.width_key, 0))
    return [[largest[group.width_key] * group.multiple for group in model.ffn_groups(i)] for i in range(model.block_count)]


def configuration(model: Model, widths: Widths) -> tuple[dict[str, Any], dict[str, str]]:
    """Return config.json for these stored widths, and the generated files by name."""
    config = without_foreign_code(model.checkpoint.config)
    if model.ragged:
        config = _plain_again(model, config)
    if is_uniform(model, widths):
        for index, block in enumerate(widths):
            for group, width in zip(model.ffn_groups(index), block, strict=True):
                if group.width_key:
                    config = with_config_value(config, group.width_key, width // group.multiple)
        return config, own_files(model)
    check_ragged(model)
    return _ragged(model, config, [block[0] if block else None for block in widths])


def own_files(model: Model) -> dict[str, str]:
    """The code that belongs to a model by file name: a ragged one's, generated again; of others what was trusted, if any."""
    if not model.ragged:
        return dict(model.code)
    if not model.checkpoint.file_of:
        return {}
    check_ragged(model)
    return generated_files(model.family, model.architecture)[0]


def own_config(config: dict[str, Any], architecture: Architecture | None = None) -> dict[str, Any]:
    """Clean a source's config.json for OUT.

    `architecture`: by default the family's row of the table; without one no class is named.

    Returns:
        The configuration without foreign code; a ragged one names the generated classes only.
    """
    config = without_foreign_code(config)
    model_type = str(config.get("model_type"))
    family = model_type.removeprefix(RAGGED_PREFIX)
    if model_type == family:
        return config
    architecture = architecture or ARCHITECTURES.get(family)
    if architecture is None or not can_be_ragged(architecture):
        return {key: value for key, value in config.items() if key != "auto_map"}
    return config | _ragged_classes(family, architecture)


def _plain_again(model: Model, config: dict[str, Any]) -> dict[str, Any]:
    config = {key: value for key, value in config.items() if key not in ("block_configs", "auto_map")}
    return config | {"model_type": model.family, "architectures": [class_names(model.family, model.architecture)["causal_class"]]}


def class_names(family: str, architecture: Architecture) -> dict[str, str]:
    """Names of the transformers classes of a family: "config_class", "base_class" and "causal_class"."""
    if architecture.derived:
        return dict(zip(("config_class", "base_class", "causal_class"), architecture.classes, strict=True))
    start = CLASSES[family]
    inner = start + "Text" if family == "gemma3_text" else start
    causal = "LMHeadModel" if family == "gpt2" else "ForCausalLM"
    return {"config_class": f"{inner}Config", "base_class": f"{inner}Model", "causal_class": start + causal}


def _ragged_classes(family: str, architecture: Architecture) -> dict[str, Any]:
    """Keys of config.json that name the generated classes."""
    _, causal, configuration_class = generated_files(family, architecture)
    auto_class = "AutoModelForImageTextToText" if causal.endswith("ForConditionalGeneration") else "AutoModelForCausalLM"
    modeling, configuring = MODELING_FILE.removesuffix(".py"), CONFIGURATION_FILE.removesuffix(".py")
    return {
        "model_type": RAGGED_PREFIX + family,
        "architectures": [causal],
        "auto_map": {
            "AutoConfig": f"{configuring}.{configuration_class}",
            "AutoModel": f"{modeling}.Compresskit{class_names(family, architecture)['base_class']}",
            auto_class: f"{modeling}.{causal}",
        },
    }


def generated_files(family: str, architecture: Architecture) -> tuple[dict[str, str], str, str]:
    """Return (files by name, architecture class, configuration class) of a family's ragged layout."""
    names, ffn = class_names(family, architecture), ragged_ffn(architecture)
    causal = "DeciLMForCausalLM" if family in DECI_FAMILIES else f"Compresskit{names['causal_class']}"
    fields = names | {
        "family": family,
        "model_type": RAGGED_PREFIX + family,
        "architecture": causal,
        "blocks": architecture.blocks.split(".", 1)[1],
        "in_projections": list(ffn.in_projections),
        "out_projection": ffn.out_projection,
        "fused": ffn.fused,
    }
    modeling = _MODELING
    if architecture.derived:
        modeling = modeling.replace(_RESIZE, _RESIZE_DERIVED).replace(_CLASS_START, _CLASS_START + _AS_STOCK)
    files = {CONFIGURATION_FILE: _CONFIGURATION.format(**fields), MODELING_FILE: modeling.format(**fields)}
    return files, causal, f"Compresskit{names['config_class']}"


def ragged_ffn(architecture: Architecture) -> Sublayer:
    """The feed-forward network that the blocks of a ragged checkpoint have, if they have one."""
    if not architecture.derived:
        return architecture.ffns[0]
    return next(kind.ffns[0] for kind in architecture.kinds if kind.ffns)


def _ragged(model: Model, config: dict[str, Any], widths: Sequence[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    ffn = ragged_ffn(model.architecture)
    files, _, _ = generated_files(model.family, model.architecture)
    if model.architecture.derived:
        blocks = [{"ffn": {"intermediate_size": width, "no_op": width is None}} for width in widths]
        config = config | _ragged_classes(model.family, model.architecture) | {"block_configs": blocks}
        largest = max(width for width in widths if width is not None)
        return with_config_value(config, ffn.width_key, largest) if ffn.width_key else config, files
    heads = config.get("num_attention_heads") or config.get("n_head")
    if not isinstance(heads, int):
        raise RequestError(f"{model.checkpoint.folder / 'config.json'}: no number of attention heads; restore the file")
    group = heads // int(config.get("num_key_value_heads") or heads)
    blocks = [
        {"attention": {"n_heads_in_group": group, "no_op": False}, "ffn": {"intermediate_size": width, "no_op": False}}
        for width in widths
    ]
    return config | _ragged_classes(model.family, model.architecture) | {
        ffn.width_key: max(widths),
        "block_configs": blocks,
    }, files
