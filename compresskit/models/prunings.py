"""What the prunings of a manifest removed: channels of feed-forward networks, whole blocks, or whole experts."""

from __future__ import annotations

from typing import Any

from compresskit.checkpoint.manifest import chain
from compresskit.errors import RequestError
from compresskit.models.model import Model

BLOCKS, EXPERTS = ("depth",), ("reap", "m-smoe", "ream", "frequency", "random-experts")
"""Methods of `prune` that remove whole blocks, and whole experts; all others remove channels."""


def prunings(model: Model) -> list[dict[str, Any]]:
    """The prunings that a model's manifest records."""
    return [link for link in chain(model.checkpoint.manifest) if link.get("stage") == "prune"]


def channel_prunings(model: Model) -> list[dict[str, Any]]:
    """Those that removed channels."""
    return [link for link in prunings(model) if link.get("method") not in (*BLOCKS, *EXPERTS)]


def check_same_parts(compressed: Model, original: Model) -> None:
    """Compare the numbers of blocks and of linears, where a manifest says that blocks or experts were removed.

    Raises:
        RequestError: they differ; then no block, or no expert, has a counterpart by its number.
    """
    here, there = compressed.checkpoint.folder, original.checkpoint.folder
    for methods, what, differ in (
        (BLOCKS, f"blocks out of the {original.block_count} of", compressed.block_count != original.block_count),
        (EXPERTS, "experts out of", len(compressed.linears) != len(original.linears)),
    ):
        method = next((link["method"] for link in prunings(compressed) if link.get("method") in methods), None)
        if method and differ:
            raise RequestError(
                f"{here}: `prune {method}` took {what} {there}, and models are compared block by block; pass the pruned dense "
                "model as the original, or repair it with recover --loss distill"
            )


def kept_channels(mask: str) -> list[int]:
    """Decode the channels from a manifest's hexadecimal mask, one bit per channel, channel 0 first."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in mask)
    return [channel for channel, bit in enumerate(bits) if bit == "1"]
