"""Pack texts of different lengths into one row, without padding; each attends only to itself.

A step's samples differ in length; padded to rectangles, a quarter of the computation is padding. In one row only the
attention has to know where a text ends. The positions, which restart at 0, tell it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

STOCK = "sdpa"
"""The attention that `attend` replaces; models with another attention are not packed."""
PACKED = "compresskit-packed"
PROBE = (7, 5)
"""Lengths of the texts for testing a model."""
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.02}
"""Rounding tolerance for weights of this dtype, relative to the largest logit."""


def text_lengths(positions: Tensor) -> list[int]:
    """Lengths of the texts, in order, from positions (1, tokens) that restart at 0 with every text."""
    starts = (positions[0] == 0).nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], positions.shape[1]], strict=True)]


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **how: Any
) -> tuple[Tensor, None]:
    """Causal attention inside each text of one row; transformers calls it like its own.

    query (1, heads, tokens, size), key and value with as many or fewer heads. `how` holds "position_ids" (1, tokens), without
    which the row is one text, and the arguments for transformers' own attention. transformers makes no mask for unknown
    attentions, so `attention_mask` is None. Products use at least float32: on a CPU the backward pass in bfloat16 takes two to
    four times as long at 40 to 300 tokens per text.

    Returns:
        (1, tokens, heads, size) in the value's dtype, and no weights.
    """
    positions = how.get("position_ids")
    lengths = [query.shape[2]] if positions is None else text_lengths(positions)
    wide = torch.promote_types(query.dtype, torch.float32)
    parts = (torch.split(each, lengths, dim=2) for each in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        pieces = [
            sdpa_attention_forward(module, *(each.to(wide) for each in text), attention_mask, **how)[0]
            for text in zip(*parts, strict=True)
        ]
    return torch.cat(pieces, dim=1).to(value.dtype), None


AttentionInterface.register(PACKED, attend)


def pack(network: PreTrainedModel, longest: int) -> bool:
    """Make the network compute the texts of one row separately, if it can; otherwise it is unchanged.

    `longest`: tokens of the longest text. Families pass different arguments to their attention, so two short texts are tried:
    the second must give the same result as alone, whatever the first is.

    Returns:
        Whether the network packs texts.
    """
    config = network.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if config._attn_implementation != STOCK or any(window and window < longest for window in windows):
        return False
    network.set_attn_implementation(PACKED)
    if _keeps_apart(network):
        return True
    network.set_attn_implementation(STOCK)
    return False


@torch.no_grad()
def _keeps_apart(network: PreTrainedModel) -> bool:
    """Whether the second of two packed texts has the same logits as alone, for two different first texts."""
    weight = next(network.parameters())
    first, second = (torch.arange(1, length + 1, device=weight.device)[None] for length in PROBE)
    positions = torch.cat([torch.arange(length, device=weight.device) for length in PROBE])[None]
    alone = network(input_ids=second, use_cache=False).logits
    for before in (first, first.flip(1)):
        row = torch.cat([before, second], dim=1)
        logits = network(input_ids=row, position_ids=positions, use_cache=False).logits[:, PROBE[0] :]
        if (logits - alone).abs().max() > TOLERANCES[weight.dtype] * alone.abs().max():
            return False
    return True
