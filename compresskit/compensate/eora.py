"""EoRA: the low-rank pair that leaves the least output error, for the calibration inputs.

EoRA, arXiv 2410.21271, section 3.2.

    minimise ||(D - B A) X^T||_F,    D = W - W_c                                                                       (1)
    C = X^T X / tokens;  A and B from the singular vectors of D C^1/2  (lowrank.py, equation 4)

symbol  meaning                                   shape         name here
W, W_c  original and compressed weight            (out, in)
X       inputs of the linear, from the prefix     (tokens, in)  seen only through the Gram matrix
        that is compressed and already repaired

Differs from the paper: the second moments are damped (`--damping`), so that directions that the text hardly shows are
not left to chance; the pair needs no inverse (lowrank.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.compensate.contract import SecondMomentsMethod

if TYPE_CHECKING:
    import torch

    from compresskit.block import Statistic
    from compresskit.lowrank import Metric


class EoRA(SecondMomentsMethod, frozen=True):
    """Output error, by all second moments of the inputs."""

    def metric(self, statistic: Statistic | None, features: int, device: torch.device) -> Metric:
        """C, (features, features), damped."""
        return self.moments(statistic, features, device)
