"""Find the keys of config.json that state the widths of feed-forward networks, by changing them.

A key is changed, the network is built again on the meta device, and the shapes are compared: a key states the width of the
networks whose shapes follow it in proportion, if nothing else changes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from compresskit.checkpoint.stock import quiet
from compresskit.models.architectures import Architecture
from compresskit.models.network import build_network

PLACEHOLDER = "{expert}"
MOST_CANDIDATES = 40
LIKELY = ("intermediate", "ffn", "inner", "mlp", "feed", "expert")
"""Parts of the names of keys that are tried first."""


def with_width_keys(
    found: Architecture, network: PreTrainedModel, config: PreTrainedConfig, trust_remote_code: bool
) -> Architecture:
    """Find the configuration key of every network's width: change a key, build again, and see which shapes follow."""
    widths = _widths(network, found)
    if not widths:
        return found
    keys: dict[tuple[int, int], tuple[str, int]] = {}
    values: dict[str, int] = {}
    before = _other_shapes(network, found)
    for key, value in _candidates(config, set(widths.values())):
        if set(keys) == set(widths):
            break
        new = 2 * (value if value is not None else min(widths.values()))
        changed = _rebuilt(config, key, new, trust_remote_code)
        if changed is None:
            continue
        after = _widths(changed, found)
        moved = {place for place, width in widths.items() if after.get(place) != width}
        base = value if value is not None else new // 2
        exact = all(after.get(place, 0) * base == widths[place] * new and widths[place] % base == 0 for place in moved)
        if moved and exact and not any(place in keys for place in moved) and _other_shapes(changed, found) == before:
            keys |= {place: (key, widths[place] // base) for place in moved}
            values[key] = base
    kinds = []
    for number, kind in enumerate(found.kinds):
        ffns = list(kind.ffns)
        for place, ffn in enumerate(ffns):
            key, multiple = keys.get((number, place), ("", 1))
            ffns[place] = replace(ffn, width_key=key, multiple=multiple)
        kinds.append(replace(kind, ffns=tuple(ffns)))
    return replace(found, kinds=tuple(kinds), widths=tuple(values.items()))


def _candidates(config: PreTrainedConfig, widths: set[int]) -> list[tuple[str, int | None]]:
    """(key, value) of numbers in a configuration that could be a width, the likeliest first; None for a width by default."""
    found: list[tuple[str, int | None]] = []
    for prefix, values in _sections(config.to_dict(), ""):
        for key, value in values.items():
            fits = type(value) is int and value > 1 and any(width % value == 0 for width in widths)
            if fits or (value is None and ("inner" in key or "ffn" in key or "intermediate" in key)):
                found.append((prefix + key, value))
    return sorted(found, key=lambda each: (not any(word in each[0] for word in LIKELY), each[1] not in widths))[:MOST_CANDIDATES]


def _sections(values: dict[str, Any], prefix: str) -> list[tuple[str, dict[str, Any]]]:
    found = [(prefix, values)]
    for key, value in values.items():
        if key == "text_config" and isinstance(value, dict):
            found += _sections(value, f"{prefix}{key}.")
    return found


def _rebuilt(config: PreTrainedConfig, key: str, value: int, trust_remote_code: bool) -> PreTrainedModel | None:
    """The network with another value of one key, None if there is none."""
    values = config.to_dict()
    inner = values
    *path, last = key.split(".")
    for part in path:
        inner = inner[part]
    inner[last] = value
    try:
        with quiet():
            changed = type(config).from_dict(values)
            changed.architectures = config.architectures
            return build_network(changed, trust_remote_code)
    except Exception:  # a configuration that contradicts itself: this key is no width alone
        return None


def _widths(network: nn.Module, found: Architecture) -> dict[tuple[int, int], int]:
    """Width of every network of every kind of block, by (kind, place)."""
    widths = {}
    for number, kind in enumerate(found.kinds):
        block = network.get_submodule(f"{found.blocks}.{found.kind_of.index(number)}")
        for place, ffn in enumerate(kind.ffns):
            width = _input_width(block, ffn.out_projection)
            if width is not None:
                widths[(number, place)] = width
    return widths


def _input_width(block: nn.Module, name: str) -> int | None:
    head, placeholder, leaf = name.partition(f".{PLACEHOLDER}.")
    module: Any = block.get_submodule(head)
    if not placeholder:
        return int(module.weight.shape[0 if isinstance(module, Conv1D) else 1])
    if hasattr(module, "fused"):  # unpacked already
        return int(module.get_submodule(f"0.{leaf}").weight.shape[1])
    weight = getattr(module, leaf)
    return int(weight.shape[1 if module.is_transposed else 2])


def _other_shapes(network: nn.Module, found: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters but those of the feed-forward networks."""
    ours: set[str] = set()
    for index, number in enumerate(found.kind_of):
        for ffn in found.kinds[number].ffns:
            for name in (*ffn.in_projections, ffn.out_projection):
                ours.add(f"{found.blocks}.{index}.{name.partition(f'.{PLACEHOLDER}.')[0]}.")
    return {
        name: tuple(parameter.shape) for name, parameter in network.named_parameters(remove_duplicate=False)
        if not any(name.startswith(each) for each in ours)
    }  # fmt: skip
