"""One linear in ApiQ's training: its trained parameters and the resulting weight (equations 2 and 3 of method.py)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit.formats.compressed_tensors import stored_linear
from compresskit.formats.peft import EIGHT_BIT_SCALE
from compresskit.numerics.eight_bit_factors import EIGHT_BITS, eight_bit_factors, in_eight_bits, rounded_pair
from compresskit.numerics.grid import Grid, grid_of_range, grouped, range_of
from compresskit.numerics.lowrank import Metric, low_rank_factors
from compresskit.numerics.packed import QuantizedLinear, Storage
from compresskit.numerics.scheme import Scheme
from compresskit.numerics.straight_through import straight_through

START_CLIPPING = 4.0
"""g_0: sigmoid(4) = 0.982 (ApiQ, section 4.2)."""
Pair = tuple[Tensor, Tensor]


def clipped_grid(low: Tensor, high: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
    """The grid of a range (out, groups), as grid.py builds it; gradients flow from the scale to the range."""
    with torch.no_grad():
        exact = grid_of_range(low, high, scheme, scale_dtype)
    span = 2 * torch.maximum(high, -low) if scheme.symmetric else high - low
    return Grid(straight_through(span / scheme.steps, exact.scale), exact.zero_point)


def soft_codes(target: Tensor, offset: Tensor, grid: Grid, scheme: Scheme) -> Tensor:
    """The codes of equation 2, (out, groups, group), with straight-through gradients; target and offset (out, in)."""
    position = grouped(target, scheme) / grid.scale.unsqueeze(-1) + grid.zero_point.unsqueeze(-1) + grouped(offset, scheme)
    return straight_through(position, position.round()).clamp(scheme.lowest, scheme.highest)


@dataclass
class TrainedLinear:
    """One linear in training: its constants, and the parameters of equations 2 and 3."""

    target: Tensor
    storage: Storage
    low: Tensor
    high: Tensor
    offset: Tensor
    low_clipping: Tensor
    high_clipping: Tensor
    adapter: Pair | None = None
    """A (rank, in) and B (out, rank)."""
    start_adapter: Pair | None = None
    saliency: Tensor | None = None
    """(out, in), or (in,) if all rows are equal."""
    original: Tensor | None = None
    """(out, in), if the saliency term holds the weight near it."""

    @classmethod
    def of(cls, original: Tensor, target: Tensor, storage: Storage) -> TrainedLinear:
        """Build the linear at its starting point, without an adapter; original and target (out, in)."""
        low, high = range_of(original, storage.scheme)
        clipping = torch.full_like(low, START_CLIPPING)
        return cls(target, storage, low, high, torch.zeros_like(target), clipping, clipping.clone())

    def start_with_adapter(self, original: Tensor, metric: Metric | None) -> None:
        """Start with the best low-rank repair of the rounding error of the original weight (out, in).

        If `metric` is None, no inputs were seen and the pair is zero.
        """
        rank, (rows, columns) = self.storage.rank, original.shape
        if metric is None:
            self.start_adapter = original.new_zeros(rank, columns), original.new_zeros(rows, rank)
        else:
            residual = original - self.weights()[0]
            if self.eight_bits:
                first, second = eight_bit_factors(residual, metric, rank, EIGHT_BIT_SCALE)
                self.start_adapter = first.float(), EIGHT_BIT_SCALE * second.float()
            else:
                self.start_adapter = low_rank_factors(residual, metric, rank)
        self.reset()

    @property
    def eight_bits(self) -> bool:
        """Whether the adapter is stored in 8 bits."""
        return self.storage.factor_dtype == EIGHT_BITS

    def reset(self) -> None:
        """Return to the starting point."""
        self.offset.zero_()
        self.low_clipping.fill_(START_CLIPPING)
        self.high_clipping.fill_(START_CLIPPING)
        self.adapter = self.start_adapter and (self.start_adapter[0].clone(), self.start_adapter[1].clone())

    def grid(self) -> Grid:
        """Equation 3: scales and zero points, (out, groups) each."""
        start = 1 / (1 + math.exp(-START_CLIPPING))
        low, high = self.low * (self.low_clipping.sigmoid() / start), self.high * (self.high_clipping.sigmoid() / start)
        return clipped_grid(low, high, self.storage.scheme, self.storage.scale_dtype)

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights (without, with) the low-rank pair, (out, in) each; equation 2."""
        grid = self.grid()
        codes = soft_codes(self.target, self.offset, grid, self.storage.scheme)
        weight = ((codes - grid.zero_point.unsqueeze(-1)) * grid.scale.unsqueeze(-1)).flatten(1)
        if self.adapter is None:
            return weight, weight
        first, second = self.adapter
        if self.eight_bits:
            with torch.no_grad():
                rounded = rounded_pair(first, second, EIGHT_BIT_SCALE)
            first, second = straight_through(first, rounded[0]), straight_through(second, rounded[1])
        return weight, weight + second @ first

    def stored(self) -> QuantizedLinear:
        """Stored tensors at the current parameters, with the adapter's factors as `lora_A.weight` and `lora_B.weight`."""
        scheme, scale_dtype, factor_dtype = self.storage.scheme, self.storage.scale_dtype, self.storage.factor_dtype
        grid = self.grid()
        codes = soft_codes(self.target, self.offset, grid, scheme).flatten(1)
        tensors, weight = stored_linear(codes, grid, scheme, scale_dtype, self.storage.unpacked_dtype)
        if self.adapter is None:
            return QuantizedLinear(tensors, weight, None)
        first, second = in_eight_bits(*self.adapter, EIGHT_BIT_SCALE) if self.eight_bits else self.adapter
        scale = EIGHT_BIT_SCALE if self.eight_bits else 1.0
        first, second = first.to(factor_dtype), second.to(factor_dtype)
        tensors |= {"lora_A.weight": first, "lora_B.weight": second}
        return QuantizedLinear(tensors, weight + scale * (second.float() @ first.float()), None)

    def distance(self, weight: Tensor) -> Tensor:
        """sum(F * (W_q - W)^2) of equation 1, a number; weight: W_q (out, in)."""
        assert self.original is not None
        squares = (weight - self.original).square()
        return (squares if self.saliency is None else squares * self.saliency).sum()
