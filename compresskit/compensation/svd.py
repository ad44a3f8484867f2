"""svd: the low-rank pair closest to the weight error, independent of the inputs; needs no text.

Eckart-Young: minimise ||D - B A||_F by the truncated singular value decomposition of D = W - W_c (out, in). It is the
baseline "ZeroQuant-V2" of EoRA, arXiv 2410.21271, section 4.1, after arXiv 2303.08302.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from compresskit.compensation.method import CompensateMethod

if TYPE_CHECKING:
    import torch

    from compresskit.numerics.lowrank import Metric
    from compresskit.walk.hooks import Statistic


class SVD(CompensateMethod, frozen=True):
    """Unweighted weight error."""

    needs_activations: ClassVar[bool] = False

    def metric(self, statistic: Statistic | None, features: int, device: torch.device) -> Metric:
        """The identity, (features, features)."""
        import torch

        from compresskit.numerics.lowrank import Metric

        return Metric(torch.eye(features, device=device))
