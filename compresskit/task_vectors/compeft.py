"""ComPEFT: a task vector as the signs of its largest entries and one scale.

Yadav, Choshen, Raffel, Bansal, arXiv 2311.13171, section 2, algorithm 1.

    kept  = the k n entries of largest |tau|, over the whole flattened vector                                   (1)
    tau'  = alpha * std(tau) * sign(tau) where kept, 0 elsewhere                                                (2)

and what the paper compares with:

    stc     tau' = alpha * mean(|tau| over kept) * sign(tau)       (sparse ternary compression, arXiv 1903.02891) (3)
    prune   tau' = tau where kept                                                                               (4)

symbol  meaning                                shape     name here
tau     what fine-tuning added                 (n,)      seen as a stream
k       share of entries that are kept         ()        density
alpha   factor of the scale                    ()        alpha
        std over all n entries, before (1)     ()        Spread.std

Differs from the paper: each pair of LoRA factors is replaced, before (1), by the pair of the same product whose parts
weigh alike (`balance`; what it is worth is in docs/evidence/compeft.md). std divides by n instead of n - 1; of entries at the
threshold the first ones are kept; IA3's vector is its parameters minus 1, which change nothing at 1.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from compresskit.formats.ternary.sections import Coding
from compresskit.stages import Method

ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
"""Section 3.1 of the paper: the grid from which the validation set picks."""


def scale(variant: str, alpha: float, std: float, kept_mean: float) -> float:
    """Equations 2 and 3; 1 for variant prune, which keeps values."""
    return {"compeft": alpha * std, "stc": alpha * kept_mean, "prune": 1.0}[variant]


class ComPEFT(Method, frozen=True):
    """The settings of a ternary task vector."""

    density: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the entries that are kept, over the whole vector."""
    alpha: Annotated[float, Field(gt=0)] | Literal["auto"] = 1.0
    """Factor of the scale; auto picks from 0.5, 1, 2, ..., 10 what gives the least loss on --validation."""
    variant: Literal["compeft", "stc", "prune"] = "compeft"
    """Scale by the spread of the whole vector, by the mean of the kept magnitudes, or keep the values themselves."""
    balance: bool = True
    """Of LoRA, compress the pair of factors of the same product that weigh alike; off, the pair as it is stored."""
    coding: Coding = "auto"
    """golomb, bitmask, or the smaller of both, section by section."""
