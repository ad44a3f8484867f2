"""The walk shared by all pruning methods: score, keep, refit and write, block by block.

Statistics come from the pruned prefix: each block sees the outputs of its pruned predecessors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.checkpoint.writer import Writer
from compresskit.machine.precision import torch_dtype
from compresskit.models.layouts import Widths
from compresskit.models.meta import to_stored
from compresskit.models.model import Ffn, FfnGroup, Model
from compresskit.numerics.rows import join_rows, split_rows
from compresskit.pruning.channels import Channels, ChannelStatistics, channels_of, collected, kept_rows
from compresskit.pruning.flap import output_bias
from compresskit.pruning.method import PruneMethod
from compresskit.pruning.refit import refit
from compresskit.pruning.request import PruneRequest
from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock, finish_block
from compresskit.walk.statistics import Gram
from compresskit.walk.walk import Walk


@dataclass(frozen=True)
class Pruned:
    """One feed-forward network after pruning."""

    kept: Tensor
    """Kept channels in ascending order, (kept,) int64."""
    weights: tuple[Tensor, ...]
    """Input projections (fused * kept, hidden), then the output projection (hidden, kept)."""
    biases: tuple[Tensor | None, ...]
    """Biases in the same order."""
    error: float | None
    """Output error on the calibration inputs relative to the output's energy; None without a refit."""


def prune_blocks(request: PruneRequest, walk: Walk, widths: tuple[Widths, Widths], writer: Writer, on_block: OnBlock) -> None:
    """Prune all blocks. Each block's facts go to `writer.facts["blocks"]`, its tensors to the writer.

    `widths`: the target widths and the widths on disk, which are larger if the layout pads. Blocks finished by an interrupted
    run are read from its output and only run.
    """
    model = walk.model
    for block in walk:
        if block.index not in writer.done:
            facts = _prune_block(request, walk, block, (widths[0][block.index], widths[1][block.index]), writer)
            finish_block(model, block, writer, facts)
        on_block("pruning", block.index + 1, model.block_count)
    writer.copy_missing(model.checkpoint)


def _prune_block(
    request: PruneRequest, walk: Walk, block: Block, widths: tuple[list[int], list[int]], writer: Writer
) -> dict[str, Any]:
    """`widths`: target and stored widths of the block's groups."""
    method, with_bias = request.method, request.output_bias
    groups = walk.model.ffn_groups(block.index)
    narrowed = [group for group, width in zip(groups, widths[0], strict=True) if width < group.width]
    statistics: ChannelStatistics = {}
    if walk.all_batches:
        statistics = collected(narrowed, method.refit or method.needs_covariance, block, walk.device, advance=False)
    masks: list[list[str]] = []
    errors: list[float] = []
    for group, width, stored in zip(groups, *widths, strict=True):
        masks.append([])
        packed: dict[str, list[Tensor]] = {}
        for member, ffn in enumerate(group.members):
            if width < group.width:
                channels = channels_of(block, group, member, statistics)
                result = prune_channels(method, channels, (block, group, ffn), width, with_bias)
                del channels
                statistics.pop(ffn.out_projection, None)
                _replace(walk, block, ffn, result)
                if block.kept:
                    block.kept.narrow(result.kept)
                masks[-1].append(bitmask(result.kept, group.width))
                errors += [] if result.error is None else [result.error]
            # A bias that the source lacks is added in every block, even if the block loses no channel.
            if width < group.width or stored > group.width or with_bias:
                tensors = _stored_network(walk.model, block, group, ffn, stored, writer)
                _put(walk.model, tensors, packed, writer)
        for name, matrices in packed.items():
            writer.put(name, torch.stack(matrices))
    mean_error = sum(errors) / len(errors) if errors else None
    return {"widths": widths[0], "kept_channels": masks, "relative_output_error": mean_error}


def prune_channels(
    method: PruneMethod, channels: Channels, place: tuple[Block, FfnGroup, Ffn], width: int, with_bias: bool
) -> Pruned:
    """Keep the `width` best channels of the network at `place`; refit and correct the bias if the method says so."""
    block, group, ffn = place
    kept = method.channel_scores(channels).topk(width).indices.sort().values
    down = channels.down.float()
    new_down, error = down[:, kept], None
    activations = channels.activations
    if method.refit and isinstance(activations, Gram) and activations.tokens:
        gram = activations.matrix()
        is_removed = torch.ones(group.width, dtype=torch.bool, device=kept.device)
        is_removed[kept] = False
        refitted = refit(down, gram, kept, is_removed.nonzero().flatten())
        new_down = refitted.weight
        error = refitted.error / refitted.energy if refitted.energy > 0 else 0.0
    bias: Tensor | None = block.linear(ffn.out_projection).bias
    if with_bias and activations is not None and activations.tokens:
        mean = (activations.sum / activations.tokens).float()
        correction = output_bias(mean, down, kept, new_down)
        bias = correction if bias is None else bias + correction
    ins = [block.linear(name) for name in ffn.in_projections]
    weights = tuple(kept_rows(linear.weight, kept, group) for linear in ins)
    biases = tuple(None if linear.bias is None else kept_rows(linear.bias, kept, group) for linear in ins)
    return Pruned(kept, (*weights, new_down), (*biases, bias), error)


def _replace(walk: Walk, block: Block, ffn: Ffn, result: Pruned) -> None:
    """Put the pruned weights into the block, rounded to their stored dtype."""
    names = (*ffn.in_projections, ffn.out_projection)
    for name, weight, bias in zip(names, result.weights, result.biases, strict=True):
        linear = block.linear(name)
        part = walk.model.packed(f"{name}.weight")
        stored_name = part.stored if part else walk.model.stored_name(f"{name}.weight")
        stored = torch_dtype(walk.model.checkpoint.spec(stored_name).dtype)
        linear.out_features, linear.in_features = weight.shape
        linear.register_parameter("weight", _parameter(weight, stored, walk.dtype))
        linear.register_parameter("bias", None if bias is None else _parameter(bias, stored, walk.dtype))


def _parameter(value: Tensor, stored: torch.dtype, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.to(stored).to(dtype), requires_grad=False)


def _put(model: Model, tensors: dict[str, Tensor], packed: dict[str, list[Tensor]], writer: Writer) -> None:
    """Write one network's tensors, by plain name; those of an expert that is stored with all others join `packed`."""
    joined: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        part = model.packed(name)
        if part is None:
            writer.put(model.stored_name(name), to_stored(model, name, tensor))
        else:
            joined.setdefault(part.stored, []).append(tensor)
            if len(joined[part.stored]) == part.parts:
                whole = torch.cat(joined[part.stored])
                packed.setdefault(part.stored, []).append(whole.T.contiguous() if part.transposed else whole)


def _stored_network(model: Model, block: Block, group: FfnGroup, ffn: Ffn, width: int, writer: Writer) -> dict[str, Tensor]:
    """One network in its current state, padded with zeros to `width`, in the stored dtypes, by plain name."""
    found = {}
    for name in (*ffn.in_projections, ffn.out_projection):
        linear = block.linear(name)
        is_output = name == ffn.out_projection
        for leaf, value in (("weight", linear.weight), ("bias", linear.bias)):
            part = model.packed(f"{name}.{leaf}")
            stored_name = part.stored if part else model.stored_name(f"{name}.{leaf}")
            if stored_name not in writer.specs:
                continue
            full = torch.zeros(linear.out_features) if value is None else value
            full = full.to(torch_dtype(writer.specs[stored_name].dtype))
            if not is_output:
                parts = split_rows(full, group.fused, group.interleaved)
                full = join_rows([padded(each, 0, width) for each in parts], group.interleaved)
            elif leaf == "weight":
                full = padded(full, 1, width)
            found[f"{name}.{leaf}"] = full
    return found


def padded(value: Tensor, dim: int, size: int) -> Tensor:
    """`value` with zeros appended along `dim` up to `size`."""
    shape = list(value.shape)
    shape[dim] = size - shape[dim]
    return value if shape[dim] == 0 else torch.cat([value, value.new_zeros(shape)], dim=dim)


def bitmask(kept: Tensor, width: int) -> str:
    """Kept channels (kept,) as hexadecimal digits, one bit per channel, channel 0 first; models/prunings.py reads it."""
    bits = torch.zeros(-(-width // 4) * 4, dtype=torch.int64)
    bits[kept.cpu()] = 1
    digits = (bits.view(-1, 4) * torch.tensor([8, 4, 2, 1])).sum(dim=1)
    return "".join(f"{digit:x}" for digit in digits.tolist())
