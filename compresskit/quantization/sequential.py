"""The walk shared by quantisation methods: block by block, linear by linear, on the quantised prefix.

Inside a block the linears are quantised in compute order (attention inputs, attention output, feed-forward inputs,
feed-forward outputs). The statistics of each position are collected with the earlier positions quantised.
"""

from __future__ import annotations

from compresskit.checkpoint.writer import Writer
from compresskit.formats.compressed_tensors import as_read
from compresskit.machine.precision import torch_dtype
from compresskit.models.model import Model
from compresskit.numerics.packed import QuantizedLinear
from compresskit.quantization.expert_floor import ExpertFloor
from compresskit.quantization.guide import Guide, TokenWeights
from compresskit.quantization.guided_grams import guided
from compresskit.quantization.request import QuantizeRequest
from compresskit.quantization.vanishing import check_kept
from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock, chosen_sequence, finish_block, replace_weight
from compresskit.walk.walk import Walk


def quantize_blocks(request: QuantizeRequest, walk: Walk, writer: Writer, on_block: OnBlock, guide: Guide) -> None:
    """Quantise all blocks. Each block's facts go to `writer.facts["blocks"]`, its tensors to the writer. `guide`: see guide.py.

    Blocks finished by an interrupted run are read from its output and only run.
    """
    write_shapes(request, writer)
    prepare = request.method.preparation(request.model, request.schemes, torch_dtype(request.scale_dtype))
    for block in walk:
        if block.index not in writer.done:
            tensors, facts = prepare(block)
            facts |= quantize_block(request, block, writer, guide(block.index))
            tensors |= request.method.block_tensors(request.model, block, request.schemes)
            for name, tensor in tensors.items():
                writer.put(name, tensor)
            finish_block(request.model, block, writer, facts)
        on_block("quantizing", block.index + 1, request.model.block_count)
    writer.copy_missing(request.model.checkpoint)


def write_shapes(request: QuantizeRequest, writer: Writer) -> None:
    """Write what states the shapes first: a partial folder can then be opened, whichever blocks it holds."""
    for name in request.schemes:
        for leaf, tensor in request.method.leading_tensors(request.model.linear_shape(name)).items():
            stored = f"{request.model.stored_name(name)}.{leaf}"
            if stored in writer.missing:
                writer.put(stored, tensor)


def quantize_block(request: QuantizeRequest, block: Block, writer: Writer, guide: TokenWeights) -> dict[str, object]:
    """Quantise the linears of one block in place, position by position, and write them.

    Returns:
        Facts: squared output errors relative to the output's energy, by name, if the method has them; tokens of the experts.
    """
    method, scale_dtype = request.method, torch_dtype(request.scale_dtype)
    errors: dict[str, float] = {}
    floor = ExpertFloor(block)
    for number, groups in enumerate(chosen_sequence(request.model, block.index, request.schemes)):
        with floor.watching(groups if method.needs_activations else ()):
            grams = guided(groups, block, number >= block.mixer_positions, guide) if method.needs_activations else {}
        floor.fill(grams)
        for group in groups:
            weights = [block.linear(name).weight for name in group]
            gram = grams.pop(group[0], None)
            found = method.quantize_group(weights, gram, request.schemes[group[0]], scale_dtype)
            for name, stored in zip(group, found, strict=True):
                put(request.model, block, name, stored, writer)
                scheme = request.schemes[name]
                if scheme is not None and request.unpacked_dtype != request.scale_dtype:
                    replace_weight(block.linear(name), as_read(stored.tensors, scheme, torch_dtype(request.unpacked_dtype)))
                if stored.error is not None:
                    errors[name.removeprefix(block.name + ".")] = stored.error
    return {"relative_output_errors": errors, **floor.facts()}


def put(model: Model, block: Block, name: str, stored: QuantizedLinear, writer: Writer) -> None:
    """Write one quantised linear, and set the block's weight to what readers will unpack."""
    check_kept(name, block.linear(name).weight, stored)
    for leaf, tensor in stored.tensors.items():
        writer.put(f"{model.stored_name(name)}.{leaf}", tensor)
    replace_weight(block.linear(name), stored.weight)
