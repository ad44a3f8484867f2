"""ComPEFT: represent a task vector by the signs of its largest entries and one scale.

Yadav, Choshen, Raffel, Bansal, arXiv 2311.13171, section 2, algorithm 1.

    kept  = the k n entries of largest |tau|, over the whole flattened vector                                   (1)
    tau'  = alpha * std(tau) * sign(tau) where kept, 0 elsewhere                                                (2)

and the paper's baselines:

    stc     tau' = alpha * mean(|tau| over kept) * sign(tau)       (sparse ternary compression, arXiv 1903.02891) (3)
    prune   tau' = tau where kept                                                                               (4)

symbol  meaning                                shape     name here
tau     change made by fine-tuning             (n,)      read as a stream
k       share of entries to keep               ()        density
alpha   factor of the scale                    ()        alpha
        std over all n entries, before (1)     ()        Spread.std

Differs from the paper: before (1), each pair of LoRA factors is replaced by the balanced pair with the same product
(`balance`; measured in docs/evidence/compeft.md). std divides by n instead of n - 1. Of entries at the threshold the first
ones are kept. IA3's vector is its parameters minus 1, because parameters of 1 change nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compresskit.formats.ternary.sections import Coding
from compresskit.stages import Method

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
"""Section 3.1 of the paper: the grid from which the validation set chooses."""


def scale(variant: str, alpha: float, std: float, kept_mean: float) -> float:
    """Equations 2 and 3; 1 for variant prune, which keeps values."""
    return {"compeft": alpha * std, "stc": alpha * kept_mean, "prune": 1.0}[variant]


class ComPEFT(Method, frozen=True):
    """Settings of a ternary task vector."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the entries to keep, over the whole vector."""
    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Factor of the scale; auto chooses from 0.5, 1, 2, ..., 10 by the loss on --validation."""
    variant: Literal["compeft", "stc", "prune"] = "compeft"
    """Values of kept entries: one scale from the spread of the vector (compeft) or kept magnitudes (stc), or as is (prune)."""
    balance: bool = True
    """Balance each pair of LoRA factors first, with the same product; off: compress the pair as stored."""
    coding: Coding = "auto"
    """Coding of the entries: golomb, bitmask, or the smaller of both per section (auto)."""
