"""What a compressed-tensors checkpoint by others must state and store, checked from config.json and the headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from compresskit.checkpoint.reader import FLOATS, Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import first_line, shown
from compresskit.errors import CheckpointError
from compresskit.numerics.scheme import Scheme

MOST_BITS = 8
"""What the library packs."""
LARGEST_GROUP = 1 << 24
COMPUTES_IN = ("float32", "float16", "bfloat16", "float64")
MOST_TARGETS = 100_000
Groups = tuple[tuple[tuple[str, ...], Scheme], ...]
"""(targets, scheme) of each config group."""


def place_of(checkpoint: Checkpoint) -> str:
    """Where the configuration stands, for errors."""
    return f"{checkpoint.folder / 'config.json'}: quantization_config"


class Stated(NamedTuple):
    """A config group as its file states it."""

    format: Any
    targets: tuple[str, ...]
    weights: dict[str, Any]


def stated_groups(checkpoint: Checkpoint) -> list[Stated]:
    """Read the config groups of a compressed-tensors file, of whatever format.

    Returns:
        Format, targets and weights of each.

    Raises:
        CheckpointError: a value is of the wrong type, or the weights are rotated.
    """
    config, place = checkpoint.config["quantization_config"], place_of(checkpoint)
    stated = config.get("config_groups") or {}
    if not isinstance(stated, dict) or not stated:
        raise CheckpointError(f"{place}: has no config_groups; restore the file from its source")
    rotations = config.get("transform_config") or {}
    if not isinstance(rotations, dict) or rotations.get("config_groups"):
        raise CheckpointError(f"{place}: has a transform_config, and rotated weights are not known; use the dense checkpoint")
    found = []
    for name, group in stated.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights") or {}, dict):
            raise CheckpointError(f"{place}: {shown(name)} is {shown(group)}, expected a group; restore the file")
        targets = _targets(group.get("targets") or (), place)
        found.append(Stated(group.get("format") or config.get("format"), targets, group.get("weights") or {}))
    return found


def config_groups(checkpoint: Checkpoint, known_format: str) -> Groups:
    """Read the config groups of a file of packed integers.

    Returns:
        Targets and scheme of each.

    Raises:
        CheckpointError: the format is another one, or a value is of the wrong type.
    """
    place, found = place_of(checkpoint), []
    dtype = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
    if dtype not in COMPUTES_IN:
        raise CheckpointError(f"{checkpoint.folder / 'config.json'}: dtype is {shown(dtype)}; write one of {COMPUTES_IN}")
    for stored, targets, weights in stated_groups(checkpoint):
        if stored != known_format or weights.get("type") != "int" or weights.get("strategy") not in ("group", "channel"):
            kind = f"format {shown(stored)} with {shown(weights.get('type'))} weights"
            known = f"{known_format} of integers by group or channel, and float-quantized of 8 bits throughout"
            raise CheckpointError(f"{place}: {kind}; known are {known}")
        found.append((targets, _scheme(weights, place)))
    return tuple(found)


def _targets(targets: Any, place: str) -> tuple[str, ...]:
    right = isinstance(targets, (list, tuple)) and all(isinstance(each, str) for each in targets)
    if not right or len(targets) > MOST_TARGETS:
        raise CheckpointError(f"{place}: targets are {shown(targets)}, expected a list of names; restore the file")
    return tuple(targets)


def _scheme(weights: dict[str, Any], place: str) -> Scheme:
    bits, size = weights.get("num_bits"), weights.get("group_size") or 0
    if type(bits) is not int or not 1 < bits <= MOST_BITS or type(size) is not int or not -1 <= size <= LARGEST_GROUP:
        what = f"num_bits {shown(bits)} and group_size {shown(size)}"
        raise CheckpointError(f"{place}: {what}, expected 2 to {MOST_BITS} bits and a number of weights; restore the file")
    return Scheme(bits, max(size, 0), bool(weights.get("symmetric", True)))


def stored_shape(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    """(out, in) from a tensor `weight_shape`; raises CheckpointError if it holds no shape."""
    numbers = checkpoint.read_numbers(name)
    if len(numbers) != 2 or min(numbers) < 1:
        raise CheckpointError(f"{checkpoint.file_of[name]}: {name} is {shown(numbers)}, expected (out, in); download it again")
    return numbers[0], numbers[1]


def check_stored(checkpoint: Checkpoint, scheme: Scheme, shape: tuple[int, int], expected: Sequence[TensorSpec]) -> None:
    """Raise CheckpointError unless these tensors of a linear (out, in) are stored, in these shapes."""
    for spec in expected:
        found = checkpoint.spec(spec.name)
        floats = spec.dtype in FLOATS
        shaped = spec.name.endswith(".weight_shape") or (found.shape == spec.shape and scheme.fits(shape[1]))
        if not shaped or (found.dtype in FLOATS) != floats or (not floats and found.dtype not in ("I32", "I64")):
            raise CheckpointError(
                f"{checkpoint.file_of[spec.name]}: {spec.name} is {found.dtype} {list(found.shape)}, a linear {list(shape)} in "
                f"{scheme.bits} bits has {spec.dtype} {list(spec.shape)}; download it again"
            )
    order = checkpoint.tensors.get(expected[0].name.replace(".weight_packed", ".weight_g_idx"))
    if order is not None and (order.shape != shape[1:] or order.dtype not in ("I32", "I64")):
        raise CheckpointError(f"{checkpoint.file_of[order.name]}: {order.name} is {order.dtype} {list(order.shape)}; mend it")


@contextmanager
def unpacking(checkpoint: Checkpoint, name: str) -> Iterator[None]:
    """Turn what the library raises for a linear that it cannot unpack into a CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, of a device
            raise
        file = checkpoint.file_of[f"{name}.weight_packed"]
        raise CheckpointError(f"{file}: {name} cannot be unpacked ({first_line(error)}); download it again") from error
