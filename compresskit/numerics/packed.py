"""How the parts of a block are stored, and what there is to store. Loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.numerics.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Storage(NamedTuple):
    """How the linears of a block are stored, and its norms and biases."""

    scheme: Scheme
    """The grid of all of its linears."""
    scale_dtype: torch.dtype
    """Of the grid's scales."""
    rank: int
    """Of the adapter, 0 for none."""
    factor_dtype: torch.dtype
    """Of the adapter's factors."""
    vectors: Mapping[str, torch.dtype]
    """Norms and biases that may change: their stored dtypes by their names inside the block."""


class StoredLinear(NamedTuple):
    """One quantised linear, ready to be written."""

    tensors: dict[str, Tensor]
    """What the files hold, by leaf name (`weight_packed`, `weight_scale`, ...)."""
    weight: Tensor
    """What readers unpack it to, (out, in) float32."""
    error: float | None
    """Squared output error on the calibration inputs over the output's energy; None without calibration text."""
    adapter_scale: float = 1.0
    """What the product of an adapter's factors is multiplied by."""


class StoredBlock(NamedTuple):
    """What became of one block."""

    linears: dict[str, StoredLinear]
    """By plain name."""
    vectors: dict[str, Tensor]
    """Norms and biases that changed, in their stored dtypes, by their names inside the block."""
    facts: dict[str, Any]
    """For the manifest."""
