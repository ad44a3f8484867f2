"""Scales of activations, keys and values from calibration: the largest magnitude that each block saw.

    scale = max |x| / 448                       static activations of fp8; keys and values in E4M3
    divisor = 448 * 6 / max |x|                 of the E4M3 scales of nvfp4's activations

The maximum is over all tokens of the calibration text, after the block is quantised. Keys are taken after their rotation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresskit import distributed
from compresskit.errors import UnsupportedArchitecture
from compresskit.formats.eight_bits import INPUT_SCALE
from compresskit.formats.four_bit_floats import INPUT_DIVISOR
from compresskit.models.model import Model
from compresskit.numerics.fixed_scheme import FixedScheme
from compresskit.numerics.float_grid import E2M1_LARGEST, E4M3_LARGEST
from compresskit.numerics.scheme import Scheme
from compresskit.walk.block import Block
from compresskit.walk.hooks import forward_replaced
from compresskit.walk.sequence import chosen_sequence

CACHE_NAMES = ("cache", "past_key_values", "layer_past")
"""Names under which the attentions of transformers take the cache."""


class Largest:
    """Largest magnitude of all that was added."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, x: Tensor) -> None:
        """Add activations of any shape."""
        if x.numel():
            self.value = max(self.value, float(x.detach().abs().amax()))

    def share(self) -> None:
        """Make it that of all ranks."""
        self.value = max(distributed.every(self.value))


class Cache:
    """What an attention takes for its cache: it sees keys and values, and keeps none."""

    def __init__(self) -> None:
        self.seen = {"k_scale": Largest(), "v_scale": Largest()}

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values (batch, heads, length, size), and return them."""
        self.seen["k_scale"].add(keys)
        self.seen["v_scale"].add(values)
        return keys, values


def block_scales(model: Model, block: Block, chosen: Collection[str], scheme: Scheme, cached: bool) -> dict[str, Tensor]:
    """Run a quantised block once more and measure what the format needs.

    `chosen`: the quantised linears; `cached`: whether keys and values are measured too.

    Returns:
        Tensors (1,) float32 by stored name.

    Raises:
        UnsupportedArchitecture: keys and values are asked for, and the block's attention hands none to its cache.
    """
    inputs: dict[str, Largest] = {}
    groups = [group for position in chosen_sequence(model, block.index, chosen) for group in position]
    rounded = isinstance(scheme, FixedScheme) and needs_scales(scheme)
    cache = Cache() if cached and model.architecture.block(block.index).mixer else None
    with ExitStack() as stack:
        for group in groups if rounded else ():
            inputs[group[0]] = Largest()
            stack.enter_context(_watched(block.linear(group[0]), inputs[group[0]].add))
        if cache is not None:
            stack.enter_context(_with_cache(block, cache))
        for number, hidden in enumerate(block.hidden):
            block.run(hidden, number)
    for each in (*inputs.values(), *(cache.seen.values() if cache else ())):
        each.share()
    found = {}
    for group in groups if rounded else ():
        for name in group:
            leaf, value = _leaf(scheme, inputs[group[0]].value)
            found[f"{model.stored_name(name)}.{leaf}"] = torch.tensor([value])
    if cache is not None:
        if not cache.seen["k_scale"].value:
            raise UnsupportedArchitecture(f"--kv-cache: {block.name} hands no keys to a cache; leave it out")
        found |= {
            f"{cache_name(model, block.index)}.{leaf}": torch.tensor([_span(seen.value)]) for leaf, seen in cache.seen.items()
        }
    return found


def needs_scales(scheme: FixedScheme) -> bool:
    """Whether readers of the format need scales of the activations from calibration."""
    return scheme.activations == "static" or (scheme.format == "nvfp4" and scheme.activations == "dynamic")


def cache_name(model: Model, index: int) -> str:
    """Stored name of the module whose keys and values are cached."""
    return model.stored_name(f"{model.block_name(index)}.{model.architecture.block(index).mixer}")


def _leaf(scheme: Scheme, largest: float) -> tuple[str, float]:
    """(leaf, value) of what the format stores for inputs up to this magnitude."""
    if isinstance(scheme, FixedScheme) and scheme.element == "e2m1":
        return INPUT_DIVISOR, E4M3_LARGEST * E2M1_LARGEST / max(largest, torch.finfo(torch.float32).tiny * 2**13)
    return INPUT_SCALE, _span(largest)


def _span(largest: float) -> float:
    """Scale that maps this magnitude to the largest E4M3 number; 1 for what was never seen or always 0."""
    return largest / E4M3_LARGEST or 1.0


@contextmanager
def _watched(linear: nn.Linear, add: Callable[[Tensor], None]) -> Iterator[None]:
    handle = linear.register_forward_pre_hook(lambda _, args: add(args[0]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _with_cache(block: Block, cache: Cache) -> Iterator[None]:
    """Let the block's attention hand its keys and values to a cache; raises UnsupportedArchitecture if it takes none."""
    attention = block.module.get_submodule(block.attention)
    forward = attention.forward
    known = inspect.signature(forward).parameters
    name = next((each for each in CACHE_NAMES if each in known), None)
    if name is None:
        raise UnsupportedArchitecture(f"--kv-cache: {block.name}.{block.attention} takes no cache; leave it out")
    with forward_replaced(attention, lambda *args, **kwargs: forward(*args, **{**kwargs, name: cache})):
        yield
