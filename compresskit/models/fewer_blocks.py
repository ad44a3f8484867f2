"""A model without some of its blocks: its config.json, and the names of its tensors.

The blocks that stay are counted anew from 0. In config.json the number of blocks, every list with an entry a block, every list
of block numbers and every count of leading blocks change; what a configuration class would compute from the old number
(`layer_types` from a pattern) is written out. Whether the stock network of the new file has the old blocks is another question,
which same_blocks.py answers.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import UnsupportedArchitecture
from compresskit.models.model import Model, with_config_value

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
"""Keys of config.json with the number of blocks."""
NUMBERS_OF_BLOCKS = ("mlp_only_layers", "moe_layers", "cross_attention_layers", "attn_layer_indices")
"""Keys with lists of block numbers."""
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers")
"""Keys with a number of leading blocks that differ from the others."""
LAST_OF_A_KIND = "moe_layer_end_index"
"""Key with the number of the last block that has experts."""
REPEATED = "attention_types"
"""GPT-Neo's key: a list of pairs of kinds of attention and how often they are repeated."""
NOT_BY_BLOCK = ("token", "architectures", "multipliers", "section", "limit")
"""Parts of the names of lists that have no entry a block, however long they are."""
SECTION = "text_config"


def kept_blocks(model: Model, removed: Container[int]) -> list[int]:
    """Numbers of the blocks that stay, ascending; their places in the list are the new numbers."""
    return [index for index in range(model.block_count) if index not in removed]


def renumbered(model: Model, removed: Container[int]) -> dict[str, str]:
    """Stored names of the tensors that stay: new name -> name in the source, in the source's order."""
    kept = kept_blocks(model, removed)
    new_number = {old: new for new, old in enumerate(kept)}
    names = {}
    for name in model.checkpoint.tensors:
        number = _block_number(model, name)
        if number is None:
            names[name] = name
        elif number >= model.block_count:  # blocks after the last, which predict further tokens
            names[_with_number(model, name, number - model.block_count + len(kept))] = name
        elif number in new_number:
            names[_with_number(model, name, new_number[number])] = name
    return names


def remaining_tensors(model: Model, removed: Container[int]) -> list[TensorSpec]:
    """Every tensor of the model without those blocks, under its new name, in the source's order."""
    return [replace(model.checkpoint.spec(old), name=new) for new, old in renumbered(model, removed).items()]


def _block_number(model: Model, stored: str) -> int | None:
    """Number of the block that a stored tensor belongs to, those after the last included; None outside the blocks."""
    rest = stored.removeprefix(model.stored_blocks)
    number = rest.partition(".")[0]
    return int(number) if rest != stored and number.isdecimal() else None


def _with_number(model: Model, stored: str, number: int) -> str:
    _, _, inner = stored.removeprefix(model.stored_blocks).partition(".")
    return f"{model.stored_blocks}{number}.{inner}"


class TextConfiguration(NamedTuple):
    """The part of config.json that describes the blocks."""

    prefix: str
    """Of its keys inside the file: "" or "text_config."."""
    stated: dict[str, Any]
    """Its keys in the file."""
    values: dict[str, Any]
    """All keys of the class, defaults included."""


def text_configuration(model: Model) -> TextConfiguration:
    """A model's text configuration: a section of config.json, or the whole file."""
    from compresskit.models.network import configuration_of

    config, stated = configuration_of(model.checkpoint), model.checkpoint.config
    text = config.get_text_config()
    if text is not config and isinstance(stated.get(SECTION), dict):
        return TextConfiguration(f"{SECTION}.", stated[SECTION], text.to_dict())
    return TextConfiguration("", stated, text.to_dict())


def with_text_values(model: Model, prefix: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config.json with other values in its text configuration."""
    config = dict(model.checkpoint.config)
    for key, value in changed.items():
        config = with_config_value(config, prefix + key, value)
    return config


def configuration(model: Model, removed: Container[int]) -> dict[str, Any]:
    """Cut config.json to the blocks that stay.

    Returns:
        The file of the model without those blocks.

    Raises:
        UnsupportedArchitecture: no key states the number of blocks.
    """
    prefix, stated, values = text_configuration(model)
    changed = _changed(values | {"block_configs": stated.get("block_configs")}, model.block_count, kept_blocks(model, removed))
    if not changed:
        raise UnsupportedArchitecture(f"{model.family}: no key of config.json states its number of blocks; prune its channels")
    return with_text_values(model, prefix, changed)


def _changed(values: dict[str, Any], count: int, kept: Sequence[int]) -> dict[str, Any]:
    """The keys with other values once only the `kept` of `count` blocks are left."""
    new_number = {old: new for new, old in enumerate(kept)}
    found: dict[str, Any] = {key: len(kept) for key in COUNTS if values.get(key) == count}
    for key, value in values.items():
        if key in NUMBERS_OF_BLOCKS and isinstance(value, list):
            found[key] = [new_number[number] for number in value if number in new_number]
        elif key in LEADING and type(value) is int and 0 < value < count:
            found[key] = _leading(kept, value)
        elif key == LAST_OF_A_KIND and type(value) is int and value >= 0:
            found[key] = _leading(kept, value + 1) - 1
        elif _is_by_block(key, value, count):
            found[key] = [value[index] for index in kept]
    if values.get(REPEATED) is not None and "attention_layers" in found:
        found[REPEATED] = [[[kind], 1] for kind in found["attention_layers"]]
    return found


def _leading(kept: Sequence[int], count: int) -> int:
    """How many of the first `count` blocks stay."""
    return sum(index < count for index in kept)


def _is_by_block(key: str, value: Any, count: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == count and not any(part in key for part in NOT_BY_BLOCK)


def kinds_by_block(model: Model) -> list[tuple[str, ...]]:
    """What config.json calls each block, by its lists of words; () where it says nothing."""
    values, count = text_configuration(model).values, model.block_count
    lists = [
        value
        for key, value in sorted(values.items())
        if _is_by_block(key, value, count) and all(isinstance(each, str) for each in value)
    ]
    return [tuple(words[index] for words in lists) for index in range(count)]
