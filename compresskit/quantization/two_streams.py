"""The walk of methods that train whole blocks: the original and the quantised model side by side.

Each original block sees the outputs of its original predecessors, each quantised block those of its quantised predecessors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from compresskit.checkpoint.writer import Writer
from compresskit.formats.peft import factor_names
from compresskit.machine.precision import torch_dtype
from compresskit.models.model import Model
from compresskit.numerics.packed import QuantizedBlock, QuantizedLinear, Storage
from compresskit.quantization.block_method import BlockMethod
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.sequential import put, write_shapes
from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock, chosen_sequence, finish_block
from compresskit.walk.walk import Walk

Saliencies = Callable[[int], Mapping[str, Tensor]]
"""Function from a block's index to the saliencies of its linears, by plain name."""


def quantize_blocks(
    request: QuantizeRequest,
    method: BlockMethod,
    walks: tuple[Walk, Walk],
    saliencies: Saliencies,
    writer: Writer,
    on_block: OnBlock,
) -> None:
    """Walk both streams. Each block's facts go to `writer.facts["blocks"]`, its tensors to the writer.

    `walks`: one of the original, one of the model being quantised. Blocks finished by an interrupted run are read from its
    output and only run.
    """
    model = request.model
    write_shapes(request, writer)
    prepare = method.preparation(model, request.schemes, torch_dtype(request.scale_dtype))
    for original, compressed in zip(*walks, strict=True):
        if compressed.index not in writer.done:
            sequence = chosen_sequence(model, compressed.index, request.schemes)
            names = [name for groups in sequence for group in groups for name in group]
            facts: dict[str, Any] = {}
            if names:
                schemes = {name: scheme for name in names if (scheme := request.schemes[name]) is not None}
                scales, unpacked, factors = map(torch_dtype, (request.scale_dtype, request.unpacked_dtype, request.factor_dtype))
                tensors, facts = prepare(compressed)
                vectors = _vectors(model, compressed)
                storage = Storage(schemes[names[0]], scales, unpacked, request.rank, factors, vectors, schemes)
                original.advance()
                walks[0].release(original)
                found = method.quantize_block(compressed, original.hidden, sequence, storage, saliencies(compressed.index))
                _write(walks[1], compressed, found, tensors, writer)
                facts |= found.facts
            finish_block(model, compressed, writer, facts)
        on_block("quantizing", compressed.index + 1, model.block_count)
    writer.copy_missing(model.checkpoint)


def _vectors(model: Model, block: Block) -> dict[str, torch.dtype]:
    """Stored dtypes of the block's norms and biases, by their names inside the block."""
    found = {}
    for name, parameter in block.module.named_parameters():
        stored = model.stored_name(f"{block.name}.{name}")
        if parameter.ndim == 1 and stored in model.checkpoint.tensors:
            found[name] = torch_dtype(model.checkpoint.spec(stored).dtype)
    return found


def _write(walk: Walk, block: Block, found: QuantizedBlock, prepared: Mapping[str, Tensor], writer: Writer) -> None:
    """`prepared`: by stored name what was changed before the training, which may have changed it again."""
    trained = {walk.model.stored_name(f"{block.name}.{name}"): vector for name, vector in found.vectors.items()}
    for name, vector in {**prepared, **trained}.items():
        writer.put(name, vector)
    for name, stored in found.linears.items():
        tensors = dict(stored.tensors)
        for leaf, stored_name in zip(("lora_A.weight", "lora_B.weight"), factor_names(name), strict=True):
            factor: torch.Tensor | None = tensors.pop(leaf, None)
            if factor is not None:
                writer.put(stored_name, factor)
        put(walk.model, block, name, QuantizedLinear(tensors, stored.weight, None), writer)
