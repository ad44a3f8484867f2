"""GPTQ: round column by column, passing each error on to the columns not yet rounded.

GPTQ, arXiv 2210.17323. See error_feedback.py for the recursion and its symbols; it needs no inverse of H. Linears that
share an input (q, k and v; gate and up) share H and are rounded together as rows of one matrix. H uses the activations
after all previously quantised linears, also inside the block (true-sequential).

Differs from the paper: columns are taken by falling second moments (act-order, as the released code offers); the grids are
those of the original weights, so groups need no index file. With a guide each linear, or group of its rows, has an H of its
own, in which tokens count by the predictions' dependence on them (guide.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from compresskit.models.model import Model
from compresskit.quantization.format_checks import check_guide
from compresskit.quantization.formatted import FormatMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.numerics.packed import QuantizedLinear
    from compresskit.numerics.scheme import Scheme
    from compresskit.walk.statistics import Gram


class GPTQ(FormatMethod, frozen=True):
    """Rounding with error feedback."""

    damping: Annotated[float, Field(gt=0)] = 0.01
    """Damping of the second moments, as a share of their mean."""
    act_order: bool = True
    """Round inputs with large activations first (act-order)."""
    clipping: Literal["none", "error"] = "none"
    """Range of a group: none (its smallest to largest weight) or error (narrowed to the least error weighted by the inputs)."""
    guide: Literal["none", "fisher"] = "none"
    """Weight of each token in the second moments: none, or fisher (how much the predictions depend on the outputs there)."""
    guide_groups: Annotated[int, Field(ge=1, le=4)] = 1
    """Groups of a linear's rows with weights of their own, for --guide fisher."""

    needs_activations: ClassVar[bool] = True

    def check(self, model: Model) -> None:
        """Check the guide too; raises UnsupportedArchitecture or RequestError."""
        super().check(model)
        check_guide(model, self.guide, self.guide_groups)

    @property
    def guide_rows(self) -> int:
        """Groups of a linear's rows whose tokens have weights of their own; 0 for no guide."""
        return self.guide_groups if self.guide == "fisher" else 0

    def quantize_group(
        self, weights: Sequence[Tensor], gram: Gram | None, scheme: Scheme | None, scale_dtype: torch.dtype
    ) -> list[QuantizedLinear]:
        """Run the recursion over all rows of the linears (out, in); without any token they are rounded to nearest."""
        import torch

        from compresskit.numerics.grid import Grid, to_codes
        from compresskit.quantization.row_parts import round_parts

        assert scheme is not None and gram is not None
        squares = gram.squares / gram.tokens if self.clipping == "error" and gram.tokens else None
        grids = self.grids(weights, scheme, scale_dtype, squares)
        if not gram.tokens:
            nearest = (to_codes(weight, grid, scheme) for weight, grid in zip(weights, grids, strict=True))
            return [self.stored(codes, grid, scheme, scale_dtype, 0.0) for codes, grid in zip(nearest, grids, strict=True)]
        rows = torch.cat([weight.float() for weight in weights])
        whole = Grid(torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero_point for grid in grids]))
        rounded = round_parts(rows, gram.parts(len(rows)), whole, scheme, self.damping, self.act_order)
        parts = [torch.split(each, [len(weight) for weight in weights]) for each in rounded]
        found = []
        for codes, losses, energies, grid in zip(*parts, grids, strict=True):
            energy = float(energies.sum())
            error = float(losses.sum()) / energy if energy > 0 else 0.0
            found.append(self.stored(codes, grid, scheme, scale_dtype, error))
        return found
