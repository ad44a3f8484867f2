"""RTN: round every weight to the nearest point of its group's grid. The baseline; needs no text.

    Q = clamp(round(W / s) + z),    s = (max - min) / (2^bits - 1),    z = round(-min / s) + lowest          (1)

min and max are those of the group, with 0 in between (see grid.py for the symbols). `--clipping error` narrows each group's
range to the least squared weight error. On SmolLM2 at 3 bits that was worse than min-max (KL 1.338 instead of 1.297): the
largest weights matter more than their share of the error suggests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from compresskit.quantization.formatted import FormatMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.numerics.packed import QuantizedLinear
    from compresskit.numerics.scheme import Scheme
    from compresskit.walk.statistics import Gram


class RTN(FormatMethod, frozen=True):
    """Round to nearest."""

    clipping: Literal["none", "error"] = "none"
    """Range of a group: none (its smallest to largest weight) or error (narrowed to the least squared weight error)."""

    def quantize_group(
        self, weights: Sequence[Tensor], gram: Gram | None, scheme: Scheme | None, scale_dtype: torch.dtype
    ) -> list[QuantizedLinear]:
        """Equation 1 on each linear (out, in)."""
        import torch

        from compresskit.numerics.grid import to_codes

        assert scheme is not None
        clipped = None if self.clipping == "none" else weights[0].new_ones(weights[0].shape[1], dtype=torch.float32)
        grids = self.grids(weights, scheme, scale_dtype, clipped)
        return [
            self.stored(to_codes(weight, grid, scheme), grid, scheme, scale_dtype, error=None)
            for weight, grid in zip(weights, grids, strict=True)
        ]
