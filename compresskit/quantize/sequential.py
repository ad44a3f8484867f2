"""The walk that the quantisation methods share: block by block, linear by linear, on the already quantised prefix.

Inside a block the linears go in the order in which they compute (attention inputs, attention output, feed-forward
inputs, feed-forward outputs): each stage's statistics are taken with the stages before it quantised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compresskit.block import Block
from compresskit.checkpoint.writer import Writer
from compresskit.model import Model
from compresskit.scheme import Scheme
from compresskit.stages import QuantizeMethod
from compresskit.stagewise import ATTENTION_STAGES, OnBlock, chosen_stages, collected, finish_block, replace_weight
from compresskit.stored import StoredLinear
from compresskit.walk import Walk


@dataclass(frozen=True)
class Request:
    """What a quantisation needs to know besides the method."""

    schemes: dict[str, Scheme | None]
    """The grid of every linear that is quantised, by plain name."""
    scale_dtype: torch.dtype
    """In which scales are stored."""
    rank: int = 0
    """Of the adapter that is trained beside the weights."""
    factor_dtype: torch.dtype = torch.float16
    """In which the adapter's factors are stored."""

    def stages(self, model: Model, index: int) -> list[list[tuple[str, ...]]]:
        """The linears of a block that are quantised, as `Model.linear_stages` gives them; empty groups fall away."""
        return chosen_stages(model, index, self.schemes)


def quantize_blocks(method: QuantizeMethod, walk: Walk, request: Request, writer: Writer, on_block: OnBlock) -> None:
    """The quantising pass. Every block's facts go to `writer.facts["blocks"]`, its tensors to the writer.

    Blocks that an interrupted run has finished are only run, from what that run wrote.
    """
    model = walk.model
    write_shapes(model, request, writer)
    for block in walk:
        step = f"block {block.index}"
        if step not in writer.done:
            errors = quantize_block(method, walk, block, request, writer)
            finish_block(model, block, writer, {"relative_output_errors": errors})
        on_block("quantizing", block.index + 1, model.block_count)
    writer.copy_missing(model.checkpoint)


def write_shapes(model: Model, request: Request, writer: Writer) -> None:
    """Write the shape tensors first: with them a partial folder can be opened, whichever blocks it holds."""
    for name in request.schemes:
        stored = f"{model.stored_name(name)}.weight_shape"
        if stored in writer.missing:
            writer.put(stored, torch.tensor(model.linear_shape(name)))


def quantize_block(method: QuantizeMethod, walk: Walk, block: Block, request: Request, writer: Writer) -> dict[str, float]:
    """Quantise the linears of one block in place, stage by stage, and write them.

    Returns:
        The squared output error over the output's energy, by a linear's name inside the block, where the method tells it.
    """
    errors: dict[str, float] = {}
    for number, groups in enumerate(request.stages(walk.model, block.index)):
        grams = collected(groups, block, number >= ATTENTION_STAGES) if method.needs_activations else {}
        for group in groups:
            weights = [block.linear(name).weight for name in group]
            gram = grams.pop(group[0], None)
            found = method.quantize_group(weights, gram, request.schemes[group[0]], request.scale_dtype)
            for name, stored in zip(group, found, strict=True):
                put(walk.model, block, name, stored, writer)
                if stored.error is not None:
                    errors[name.removeprefix(block.name + ".")] = stored.error
    return errors


def put(model: Model, block: Block, name: str, stored: StoredLinear, writer: Writer) -> None:
    """Write one quantised linear, and let the block compute with what readers will unpack."""
    for leaf, tensor in stored.tensors.items():
        writer.put(f"{model.stored_name(name)}.{leaf}", tensor)
    replace_weight(block.linear(name), stored.weight)
