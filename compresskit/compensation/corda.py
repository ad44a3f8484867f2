"""CorDA: split each weight into a low-rank pair that fine-tuning goes on with, chosen by the inputs, and the rest.

CorDA, arXiv 2406.05223, section 3.

    C = X^T X / tokens;   W C = U S V^T;   W = U S V^T C^-1                                                            (1, 2)
    B = U_r S_r^1/2,  A = S_r^1/2 V_r^T C^-1,  W' = W - B A                                                            (3 to 5)

symbol  meaning                                                              shape               name here
W       weight of the model that is to be fine-tuned                         (out, in)
X       inputs of the linear                                                 (tokens, in)        seen only through C
U_r     left singular vectors: of the r smallest singular values             (out, r)
        (knowledge-preserved: C of text whose knowledge shall stay), or of
        the r largest (instruction-previewed: C of the task's text)
A, B    pair                                                                 (r, in), (out, r)

The model computes what it did: nothing is repaired, the pair is a start for fine-tuning. Since serving tools refuse
adapters that change their base, W' is written as a dense checkpoint, with the pair as a plain adapter in OUT/adapter.

Differs from the paper: C is damped rather than inverted again and again until its inverse is stable; with U_r known,
B A = U_r U_r^T W needs no inverse at all (lowrank.py). All in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compresskit.compensation.method import SecondMomentsMethod

if TYPE_CHECKING:
    import torch

    from compresskit.numerics.lowrank import Metric
    from compresskit.walk.block import Statistic


class CorDA(SecondMomentsMethod, frozen=True):
    """A start for fine-tuning, by the second moments of the inputs."""

    mode: Literal["instruction", "knowledge"] = "instruction"
    """What the calibration text shows: the task to learn (largest directions train), or knowledge to keep (smallest train)."""

    splits: ClassVar[bool] = True

    @property
    def smallest(self) -> bool:
        """Whether the pair takes the directions in which the inputs show least."""
        return self.mode == "knowledge"

    def metric(self, statistic: Statistic | None, features: int, device: torch.device) -> Metric:
        """C^2, (features, features): the singular vectors of W C are the eigenvectors of W C^2 W^T."""
        from compresskit.numerics.lowrank import Metric

        moments = self.moments(statistic, features, device).matrix
        return Metric(moments @ moments)
