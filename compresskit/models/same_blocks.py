"""Whether the stock network of a configuration with fewer blocks has, at each place, the block that the model had there.

A block may be made by its number: every fourth one without rotation, a scale that falls with the depth, keys and values of an
earlier block. Both networks are built without weights and their modules are compared: classes, shapes, settings and buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compresskit.checkpoint.small_files import first_line
from compresskit.checkpoint.stock import quiet
from compresskit.errors import UnsupportedArchitecture
from compresskit.models.fewer_blocks import configuration, kept_blocks
from compresskit.models.model import Model
from compresskit.models.network import build_network, configuration_of

OWN_NUMBER = ("layer_idx", "layer_id", "layer_number", "layer_index", "block_idx")
"""Parts of the names of attributes that hold a block's number, for its place in the cache of keys and values."""
SETTINGS = (int, float, str, bool, type(None), tuple, list, torch.dtype)


def check_same_blocks(model: Model, removed: Container[int]) -> None:
    """Build the stock network without those blocks and compare it with the model's own.

    Raises:
        UnsupportedArchitecture: it cannot be built, or a block or what lies around the blocks would be another one.
    """
    config = configuration(model, removed)
    remedy = "its blocks cannot be removed; prune its channels instead"
    with quiet():
        before = build_network(configuration_of(model.checkpoint))
        try:
            after = build_network(configuration_of(replace(model.checkpoint, config=config)))
        except Exception as error:  # transformers raises errors of every kind
            raise UnsupportedArchitecture(
                f"{model.family}: makes no network with fewer blocks ({first_line(error)}); {remedy}"
            ) from error
    path, kept = model.architecture.blocks, kept_blocks(model, removed)
    old_blocks: Any = before.get_submodule(path)
    new_blocks: Any = after.get_submodule(path)
    if len(new_blocks) != len(kept):
        raise UnsupportedArchitecture(
            f"{model.family}: has {len(new_blocks)} blocks where config.json states {len(kept)}; {remedy}"
        )

    def cut(value: Any) -> Any:
        """A setting; of a list with an entry a block the entries that stay, which a block may hold for all."""
        is_by_block = isinstance(value, (list, tuple)) and len(value) == model.block_count
        return [value[index] for index in kept] if is_by_block else value

    for new, old in enumerate(kept):
        if found := _difference(old_blocks[old], new_blocks[new], cut):
            raise UnsupportedArchitecture(f"{model.family}: block {old} would be another one as block {new} ({found}); {remedy}")
    if found := _difference(_Around(before, path), _Around(after, path), cut):
        raise UnsupportedArchitecture(f"{model.family}: what lies around the blocks depends on their number ({found}); {remedy}")


class _Around(nn.Module):
    """A network's modules outside its blocks, by their names."""

    def __init__(self, network: nn.Module, blocks: str):
        super().__init__()
        for number, (name, module) in enumerate(network.named_modules()):
            if not (name + ".").startswith(blocks + ".") and not any(True for _ in module.children()):
                self.add_module(f"{number if not name else name.replace('.', ' ')}", module)


def _difference(before: nn.Module, after: nn.Module, cut: Callable[[Any], Any]) -> str:
    """The first thing in which two modules differ, "" if there is none."""
    ours, theirs = dict(before.named_modules()), dict(after.named_modules())
    if ours.keys() != theirs.keys():
        return f"{min(ours.keys() ^ theirs.keys())} is in one of them only"
    for name, module in ours.items():
        other = theirs[name]
        if type(module) is not type(other):
            return f"{name or 'it'} is a {type(module).__name__}, not a {type(other).__name__}"
        if found := _different_setting(module, other, cut):
            return f"{name}.{found}" if name else found
    return ""


def _different_setting(module: nn.Module, other: nn.Module, cut: Callable[[Any], Any]) -> str:
    for name, value in vars(module).items():
        if name.startswith("_") or any(part in name for part in OWN_NUMBER) or not isinstance(value, SETTINGS):
            continue
        found = getattr(other, name, None)
        if _ordered(found) not in (_ordered(value), _ordered(cut(value))):
            return f"{name} is {value}, not {found}"
    shapes = ({name: tuple(each.shape) for name, each in one.named_parameters(recurse=False)} for one in (module, other))
    if (ours := next(shapes)) != (theirs := next(shapes)):
        return f"shapes are {ours}, not {theirs}"
    for name, buffer in module.named_buffers(recurse=False):
        value = getattr(other, name, None)
        if not isinstance(value, torch.Tensor) or value.shape != buffer.shape or not torch.equal(value, buffer):
            return f"{name} has other values"
    return ""


def _ordered(value: Any) -> Any:
    """A value; words in their order, because some classes list the kinds of blocks in that of a set."""
    return sorted(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else value
