"""The walk of methods that train whole blocks: the original model and the quantised one side by side.

Each block of the original sees what its original predecessors give, each quantised block what the quantised ones give.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compresskit.block import Block
from compresskit.checkpoint.dtypes import TORCH_DTYPES
from compresskit.checkpoint.writer import Writer
from compresskit.formats.peft import factor_names
from compresskit.model import Model
from compresskit.quantize.sequential import Request, put, write_shapes
from compresskit.stages import BlockMethod
from compresskit.stagewise import OnBlock, finish_block
from compresskit.stored import Storage, StoredBlock, StoredLinear
from compresskit.walk import Walk

Saliencies = Callable[[int], Mapping[str, Tensor]]
"""Saliencies of the linears of a block, by plain name."""


def quantize_blocks(
    method: BlockMethod, walks: tuple[Walk, Walk], request: Request, saliencies: Saliencies, writer: Writer, on_block: OnBlock
) -> None:
    """The pass over both streams. Every block's facts go to `writer.facts["blocks"]`, its tensors to the writer.

    Blocks that an interrupted run has finished are only run, from what that run wrote.
    """
    model = walks[0].model
    write_shapes(model, request, writer)
    for original, compressed in zip(*walks, strict=True):
        if f"block {compressed.index}" not in writer.done:
            stages = request.stages(model, compressed.index)
            names = [name for groups in stages for group in groups for name in group]
            facts: dict[str, Any] = {}
            if names:
                scheme = request.schemes[names[0]]
                assert scheme is not None
                vectors = _vectors(model, compressed)
                storage = Storage(scheme, request.scale_dtype, request.rank, request.factor_dtype, vectors)
                for _ in original.advance():
                    pass
                walks[0].release(original)
                found = method.quantize_block(compressed, original.hidden, stages, storage, saliencies(compressed.index))
                _write(walks[1], compressed, found, writer)
                facts |= found.facts
                scales = {name.removeprefix(compressed.name + "."): each.adapter_scale for name, each in found.linears.items()}
                facts |= {"adapter_scales": scales} if request.rank and method.has_small_factors else {}
            finish_block(model, compressed, writer, facts)
        on_block("quantizing", compressed.index + 1, model.block_count)
    writer.copy_missing(model.checkpoint)


def _vectors(model: Model, block: Block) -> dict[str, torch.dtype]:
    """Stored dtypes of the block's norms and biases, by their names inside the block."""
    found = {}
    for name, parameter in block.module.named_parameters():
        stored = model.stored_name(f"{block.name}.{name}")
        if parameter.ndim == 1 and stored in model.checkpoint.tensors:
            found[name] = TORCH_DTYPES[model.checkpoint.spec(stored).dtype]
    return found


def _write(walk: Walk, block: Block, found: StoredBlock, writer: Writer) -> None:
    for name, vector in found.vectors.items():
        writer.put(walk.model.stored_name(f"{block.name}.{name}"), vector)
    for name, stored in found.linears.items():
        tensors = dict(stored.tensors)
        for leaf, stored_name in zip(("lora_A.weight", "lora_B.weight"), factor_names(name), strict=True):
            factor: torch.Tensor | None = tensors.pop(leaf, None)
            if factor is not None:
                writer.put(stored_name, factor)
        put(walk.model, block, name, StoredLinear(tensors, stored.weight, None), writer)
