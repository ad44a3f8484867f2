"""EoRA: the low-rank pair with the least output error on the calibration inputs.

EoRA, arXiv 2410.21271, section 3.2.

    minimise ||(D - B A) X^T||_F,    D = W - W_c                                                                       (1)
    C = X^T X / tokens;  A and B from the singular vectors of D C^1/2  (lowrank.py, equation 4)

symbol  meaning                                   shape         name here
W, W_c  original and compressed weight            (out, in)
X       inputs of the linear, from the prefix     (tokens, in)  only through the Gram matrix
        that is compressed and already repaired

Differs from the paper: the second moments are shrunk towards their diagonal (`--shrinkage`), C <- (1 - s) C + s diag(C),
as in covariance estimation (Schaefer and Strimmer 2005, target D), and damped (`--damping`). GPTQ moves its errors to
directions that its calibration text hardly contains, so the same text alone would leave little to repair. KL of
SmolLM2-135M at rank 8, s = 0, 0.23 and 0.5: GPTQ 3 0.419, 0.371, 0.370; RTN 3 0.556, 0.541, 0.542; GPTQ 2 3.49, 3.38, not
run. The pair needs no inverse (lowrank.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from compresskit.compensation.method import SecondMomentsMethod

if TYPE_CHECKING:
    import torch

    from compresskit.numerics.lowrank import Metric
    from compresskit.walk.hooks import Statistic


class EoRA(SecondMomentsMethod, frozen=True):
    """Output error, by the full second moments of the inputs."""

    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share by which second moments between different inputs shrink; 1 keeps only the diagonal."""

    def metric(self, statistic: Statistic | None, features: int, device: torch.device) -> Metric:
        """C, (features, features), shrunk and damped."""
        return self.moments(statistic, features, device, self.shrinkage)
