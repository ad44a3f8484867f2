"""What config.json says of FP8 weights: `quant_method` fp8, or the groups of compressed-tensors; and what nothing explains."""

from __future__ import annotations

from typing import Any, TypeGuard

from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError
from compresskit.formats.float8 import FLOAT8, OUTPUT, SCALES, TENSOR, Block, Float8, place_of_tensor
from compresskit.formats.packed_checks import place_of, stated_groups
from compresskit.formats.patterns import Patterns

FORMATS = ("float-quantized", "naive-quantized")
USUAL_BLOCK = 128
"""Of quant_method fp8 where config.json states none."""


def fine_grained(checkpoint: Checkpoint, dtype: str) -> Float8:
    """Open a checkpoint with quant_method fp8; raises CheckpointError if its configuration or a scale does not fit."""
    config: dict[str, Any] = checkpoint.config["quantization_config"]
    size = config.get("weight_block_size", [USUAL_BLOCK, USUAL_BLOCK])
    if size is not None and not _are_sizes(size):
        what = f"weight_block_size is {shown(size)}, expected two numbers of weights"
        raise CheckpointError(f"{place_of(checkpoint)}: {what}; restore the file from its source")
    block = TENSOR if size is None else Block(size[0], size[1])
    blocks = (block,) if "weight_block_size" in config else (block, TENSOR)
    found = Float8(checkpoint, dtype, f"FP8, {block}", ("_scale_inv", "_scale"), lambda name: blocks, False)
    found.check()
    return found


def of_compressed_tensors(checkpoint: Checkpoint, dtype: str) -> Float8 | None:
    """Open a compressed-tensors checkpoint whose groups all are FP8; None for others.

    Returns:
        Its float8 weights.

    Raises:
        CheckpointError: its configuration is damaged, or a scale does not fit.
    """
    groups = [group for group in stated_groups(checkpoint) if group.weights]
    floats = [
        each.format in FORMATS and (each.weights.get("type"), each.weights.get("num_bits")) == ("float", 8) for each in groups
    ]
    if not groups or not all(floats):
        return None
    blocks = [_block_of(group.weights, place_of(checkpoint)) for group in groups]
    patterns = Patterns(place_of(checkpoint))

    def blocks_of(name: str) -> tuple[Block, ...]:
        linear = name.removesuffix(".weight")
        for group, block in zip(groups, blocks, strict=True):
            if any(patterns.targets(target, linear) for target in group.targets):
                return (block,)
        raise CheckpointError(
            f"{place_of_tensor(checkpoint, name)} is float8, but no config group targets it; restore config.json"
        )

    form = "FP8, " + ", ".join(map(str, dict.fromkeys(blocks)))
    found = Float8(checkpoint, dtype, form, ("_scale",), blocks_of, True)
    found.check()
    return found


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Whether this is the height and the width of a block."""
    return isinstance(value, list) and len(value) == 2 and all(type(each) is int and each > 0 for each in value)


def _block_of(weights: dict[str, Any], place: str) -> Block:
    """The block of a config group's weights; raises CheckpointError if it states none that is known."""
    strategy, size, structure = weights.get("strategy"), weights.get("group_size"), weights.get("block_structure")
    if strategy == "tensor":
        return TENSOR
    if strategy == "channel":
        return OUTPUT
    if strategy == "group" and type(size) is int and size > 0:
        return Block(1, size)
    if strategy == "block" and _are_sizes(structure):
        return Block(structure[0], structure[1])
    what = f"strategy {shown(strategy)} with group_size {shown(size)} and block_structure {shown(structure)}"
    raise CheckpointError(f"{place}: {what}; of FP8 tensor, channel, group and block are known")


def unexplained(checkpoint: Checkpoint, low_bit: bool) -> TensorSpec | None:
    """Look for float8 tensors, and scales of weights, whose meaning no `quantization_config` gives.

    `low_bit`: the configuration is that of a low-bit format, whose scales may have the same names.

    Returns:
        The first such tensor, None if there is none.
    """
    for name, spec in checkpoint.tensors.items():
        if spec.dtype in FLOAT8 and (not low_bit or name.endswith(".weight")):
            return spec
        if not low_bit and name.endswith(SCALES):
            return spec
    return None
