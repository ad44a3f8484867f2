"""Storage of a block's parts: their dtypes and their tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from compresskit.numerics.scheme import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Storage(NamedTuple):
    """Storage of a block's linears, norms and biases."""

    scheme: Scheme
    """Grid of the linears in the block."""
    scale_dtype: torch.dtype
    """Dtype of the grid's scales."""
    unpacked_dtype: torch.dtype
    """Dtype in which readers unpack the weights."""
    rank: int
    """Rank of the adapter, 0 for none."""
    factor_dtype: torch.dtype
    """Dtype of the adapter's factors."""
    vectors: Mapping[str, torch.dtype]
    """Stored dtypes of norms and biases that may change, by their names inside the block."""
    schemes: Mapping[str, Scheme] = {}
    """Grids of linears that have their own, by plain name."""

    def of(self, name: str) -> Storage:
        """Storage of one linear and of those that share its input."""
        return self._replace(scheme=self.schemes.get(name, self.scheme))


class QuantizedLinear(NamedTuple):
    """One quantised linear, ready to write."""

    tensors: dict[str, Tensor]
    """Stored tensors by leaf name (`weight_packed`, `weight_scale`, ...)."""
    weight: Tensor
    """The weight that readers unpack, (out, in) float32."""
    error: float | None
    """Squared output error on the calibration inputs relative to the output's energy; None without calibration text."""


class QuantizedBlock(NamedTuple):
    """Result of one block."""

    linears: dict[str, QuantizedLinear]
    """Quantised linears by plain name."""
    vectors: dict[str, Tensor]
    """Changed norms and biases, in their stored dtypes, by their names inside the block."""
    facts: dict[str, Any]
    """Facts for the manifest."""
