"""The weights that a checkpoint's stored tensors make up, told by their names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable

LOW_BIT = re.compile(r"\.(weight(_packed|_scale|_zero_point|_shape|_g_idx|(\.\w+)+)|qweight|qzeros|scales|g_idx)$")
"""Leaves of low-bit linears; all stand for the weight."""


def weight_names(tensors: Iterable[str]) -> list[str]:
    """Stored names without the leaves of low-bit linears: each such linear once, as its weight."""
    return list(dict.fromkeys(LOW_BIT.sub(".weight", name) for name in tensors))
