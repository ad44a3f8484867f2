"""`--scaling`: factors on the inputs of linears before they are rounded, of the methods that write a grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from compresskit.models.model import Model
from compresskit.numerics.scheme import Scheme
from compresskit.stages import Method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from compresskit.walk.block import Block

    Prepare = Callable[[Block], tuple[dict[str, Tensor], dict[str, Any]]]
    """Changes a block in place: (what changes beside its linears, by stored name in stored dtypes; facts)."""


class Unscaled(Method):
    """A method of any format."""

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs are scaled before the rounding."""
        return False

    def preparation(self, model: Model, schemes: Mapping[str, Scheme | None], scale_dtype: torch.dtype) -> Prepare:
        """What is done to each block before its linears are quantised."""
        return unprepared


class Scaling(Unscaled):
    """A method whose linears may be scaled before they are rounded."""

    scaling: Literal["none", "awq"] = "none"
    """Factors on inputs before rounding, folded into the norm or linear that makes them: none, or awq (by the output error)."""

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs are scaled before the rounding."""
        return self.scaling != "none"

    def preparation(self, model: Model, schemes: Mapping[str, Scheme | None], scale_dtype: torch.dtype) -> Prepare:
        """Scale the weights, where asked to."""
        if not self.scales_inputs:
            return super().preparation(model, schemes, scale_dtype)
        from compresskit.quantization.awq import Scaler

        return Scaler(model, schemes, scale_dtype, self.nearest)

    def nearest(self, weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> Tensor:
        """A weight (out, in) rounded to nearest on the grid of its smallest to largest weights, float32."""
        from compresskit.numerics.grid import from_codes, min_max_grid, to_codes

        grid = min_max_grid(weight, scheme, scale_dtype)
        return from_codes(to_codes(weight, grid, scheme), grid, scheme)


def unprepared(block: Block) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Leave a block as it is."""
    return {}, {}


def scaling_summary(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the blocks' facts say of scaling, if any did.

    Returns:
        "scaling": by the first linear of each group that may be scaled, the number of "blocks" in which its factors have a place,
        and their mean "relative_error", None without any.
    """
    found: dict[str, list[float]] = {}
    for block in blocks:
        for name, fact in block.get("scaling", {}).items():
            found.setdefault(name, []).extend([] if fact["into"] is None else [fact["error"]])
    summary = {
        name: {"blocks": len(errors), "relative_error": sum(errors) / len(errors) if errors else None}
        for name, errors in found.items()
    }
    return {"scaling": summary} if summary else {}
