"""CorDA: split each weight into a low-rank pair for fine-tuning, chosen by the inputs, and the rest.

CorDA, arXiv 2406.05223, section 3.

    C = X^T X / tokens;   W C = U S V^T;   W = U S V^T C^-1                                                            (1, 2)
    B = U_r S_r^1/2,  A = S_r^1/2 V_r^T C^-1,  W' = W - B A                                                            (3 to 5)

symbol  meaning                                                              shape               name here
W       weight of the model to fine-tune                                     (out, in)
X       inputs of the linear                                                 (tokens, in)        only through C
U_r     left singular vectors: of the r smallest singular values             (out, r)
        (knowledge-preserved: C of text whose knowledge is preserved), or
        of the r largest (instruction-previewed: C of the task's text)
A, B    pair                                                                 (r, in), (out, r)

The model's function is unchanged: nothing is repaired, and the pair is a starting point for fine-tuning. Serving tools
refuse adapters that change their base, so W' is written as a dense checkpoint, with the pair as a plain adapter in
OUT/adapter.

Differs from the paper: C is damped instead of being inverted repeatedly until its inverse is stable. B A = U_r U_r^T W
needs no inverse at all once U_r is known (lowrank.py). All in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from compresskit.compensation.method import SecondMomentsMethod

if TYPE_CHECKING:
    import torch

    from compresskit.numerics.lowrank import Metric
    from compresskit.walk.hooks import Statistic


class CorDA(SecondMomentsMethod, frozen=True):
    """A starting point for fine-tuning, by the second moments of the inputs."""

    mode: Literal["instruction", "knowledge"] = "instruction"
    """Role of the calibration text: instruction (a task; train the largest directions) or knowledge (to keep; the smallest)."""

    splits: ClassVar[bool] = True

    @property
    def smallest(self) -> bool:
        """Whether the pair takes the directions least present in the inputs."""
        return self.mode == "knowledge"

    def metric(self, statistic: Statistic | None, features: int, device: torch.device) -> Metric:
        """C^2, (features, features): the left singular vectors of W C are the eigenvectors of W C^2 W^T."""
        from compresskit.numerics.lowrank import Metric

        moments = self.moments(statistic, features, device).matrix
        return Metric(moments @ moments)
