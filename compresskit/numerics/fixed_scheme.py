"""Schemes that a file format fixes: the codes' kind, the groups, and how readers round activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from compresskit.numerics.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor

Activations = Literal["none", "dynamic", "static"]


@dataclass(frozen=True)
class FixedScheme(Scheme):
    """A symmetric grid that a file format fixes: W ~= scale * code, with codes that are integers or small floats."""

    format: str
    """Name of the format, as `--format` spells it."""
    element: Literal["int8", "e4m3", "e2m1"]
    """What the codes are: whole numbers of 8 bits, or floats of 8 or 4."""
    rows: int = 1
    """Outputs per scale."""
    activations: Activations = "none"
    """How readers round the inputs of the linear."""

    def nearest(self, position: Tensor, zero_point: Tensor) -> Tensor:
        """Codes next to positions W / s on the grid, float32; `position` may be overwritten, `zero_point` is 0."""
        if self.element == "int8":
            return super().nearest(position, zero_point)
        from compresskit.numerics.float_grid import nearest_e2m1, nearest_e4m3

        return nearest_e4m3(position) if self.element == "e4m3" else nearest_e2m1(position)
