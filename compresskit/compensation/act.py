"""act: the low-rank pair of the error weighted by the mean magnitude of each input, the baseline of EoRA.

EoRA, arXiv 2410.21271, section 4.1 ("Act-S"); the scaling follows AWQ-like methods.

    minimise ||(D - B A) diag(mean |X|)||_F

symbol  meaning                        shape         name here
D       error to repair                (out, in)
X       inputs of the linear           (tokens, in)  only through the sum of their magnitudes
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compresskit.compensation.method import CompensateMethod

if TYPE_CHECKING:
    import torch

    from compresskit.numerics.lowrank import Metric
    from compresskit.walk.hooks import Statistic


class Act(CompensateMethod, frozen=True):
    """Weight error weighted by the mean magnitude of each input."""

    def statistic(self, features: int, device: torch.device) -> Statistic:
        """Sum of the magnitudes of every input."""
        from compresskit.compensation.magnitudes import Magnitudes

        return Magnitudes(features, device)

    def metric(self, statistic: Statistic | None, features: int, device: torch.device) -> Metric:
        """diag(mean |X|)^2, (features, features); the identity for an expert that no token reached."""
        import torch

        from compresskit.compensation.magnitudes import Magnitudes
        from compresskit.numerics.lowrank import Metric

        assert isinstance(statistic, Magnitudes)
        if not statistic.tokens:
            return Metric(torch.eye(features, device=device))
        return Metric(torch.diag((statistic.sum / statistic.tokens).square()))
