"""What the prunings of a manifest removed, by their lines in the table of stages: channels, blocks, experts or tokens."""

from __future__ import annotations

from typing import Any

from compresskit.checkpoint.manifest import chain
from compresskit.errors import RequestError
from compresskit.methods import STAGES, Stage, stage_of
from compresskit.models.model import Model

CHANNELS, BLOCKS, EXPERTS = STAGES["prune"], STAGES["prune depth"], STAGES["prune reap"]
"""All methods that remove experts share one line."""


def prunings(model: Model) -> list[dict[str, Any]]:
    """The prunings that a model's manifest records."""
    return [link for link in chain(model.checkpoint.manifest) if link.get("stage") == "prune"]


def _of(stage: Stage, model: Model) -> list[dict[str, Any]]:
    """Those by methods of one line of the table; a method that it does not know counts as one for channels."""
    return [link for link in prunings(model) if stage_of("prune", str(link.get("method"))) == stage]


def channel_prunings(model: Model) -> list[dict[str, Any]]:
    """Those that removed channels."""
    return _of(CHANNELS, model)


def check_same_parts(compressed: Model, original: Model) -> None:
    """Compare the numbers of blocks and of linears, where a manifest says that blocks or experts were removed.

    Raises:
        RequestError: they differ; then no block, or no expert, has a counterpart by its number.
    """
    here, there = compressed.checkpoint.folder, original.checkpoint.folder
    for stage, what, differ in (
        (BLOCKS, f"blocks out of the {original.block_count} of", compressed.block_count != original.block_count),
        (EXPERTS, "experts out of", len(compressed.linears) != len(original.linears)),
    ):
        links = _of(stage, compressed) if differ else []
        if links:
            raise RequestError(
                f"{here}: `prune {links[0]['method']}` took {what} {there}, and models are compared block by block; "
                "pass the pruned dense model as the original, or repair it with recover --loss distill"
            )


def kept_channels(mask: str) -> list[int]:
    """Decode the channels from a manifest's hexadecimal mask, one bit per channel, channel 0 first."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in mask)
    return [channel for channel, bit in enumerate(bits) if bit == "1"]


def kept_by_linear(blocks: list[dict[str, Any]], compressed: Model, original: Model) -> dict[str, list[int]]:
    """Kept channels by linear, from a manifest's facts about the blocks; raises ValueError and others if they do not fit."""
    found: dict[str, list[int]] = {}
    for index, facts in enumerate(blocks):
        groups = zip(compressed.ffn_groups(index), original.ffn_groups(index), facts["kept_channels"], strict=True)
        for group, whole, masks in groups:
            for ffn, mask in zip(group.members, masks, strict=False):  # no masks if all channels were kept
                kept = kept_channels(mask)
                if len(kept) > group.width or kept[-1:] > [whole.width - 1]:
                    raise ValueError(f"{len(kept)} channels of block {index}, up to number {kept[-1]}")
                for name in (*ffn.in_projections, ffn.out_projection):
                    found[name] = kept
    return found
