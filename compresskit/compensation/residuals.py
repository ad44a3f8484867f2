"""The residual to repair in a linear: its weight error, or the difference of its output from the original's.

    aim "weight":  D = W - W_c                                                                                         (1)
    aim "output" or "block":
                   D = argmin ||W X^T - (W_c + D) X_c^T||_F^2 + damping ||D - D_1||^2
                     = D_1 + (W X^T X_c - (W_c + D_1) X_c^T X_c) (X_c^T X_c + damping)^-1                              (2)

symbol  meaning                                                    shape             name here
X       inputs of the linear in the original model; for "block":   (tokens, in)      only through W X^T
        in the original's block on the compressed model's hidden
        states
X_c     its inputs in the compressed model, repaired so far        (tokens, in_c)
D_1     D of equation 1, or 0 if the linear lost inputs            (out, in_c)       weight_error

Equation 1 is EoRA's. Equation 2 also corrects changes of the inputs by earlier blocks, and is the only one that works if
channels are missing: it projects the dense weight onto the remaining inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.numerics.factorised import in_one_thread
from compresskit.numerics.lowrank import Metric
from compresskit.walk.hooks import Statistic
from compresskit.walk.statistics import Gram


class Outputs:
    """Outputs W x of some linears for all tokens, in the order of the micro-batches."""

    def __init__(self, weights: Sequence[Tensor]):
        """`weights`: (out, in) each, of linears that share their input."""
        self.weights = torch.cat(list(weights))
        self.keep_inputs = self.weights.shape[1] < self.weights.shape[0]
        self.kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, in). Inputs or outputs are kept, whichever is smaller."""
        self.kept.append(x if self.keep_inputs else x @ self.weights.T.to(x))

    def share(self) -> None:
        """Nothing to share: each rank needs the outputs of its own micro-batches."""

    def outputs(self, micro_batch: int) -> Tensor:
        """Outputs of all weights side by side, (tokens, sum of out), for one micro-batch."""
        kept = self.kept[micro_batch]
        return kept @ self.weights.T.to(kept) if self.keep_inputs else kept


class Paired:
    """Statistic of the compressed model's inputs and, if outputs are the aim, their products with those."""

    def __init__(self, statistic: Statistic | None, outputs: Outputs | None, features: int, device: torch.device):
        self.statistic, self.outputs = statistic, outputs
        self.gram = statistic if isinstance(statistic, Gram) else Gram(features if outputs else 0, device)
        self.cross = torch.zeros(len(outputs.weights) if outputs else 0, features, dtype=torch.float64, device=device)
        """W X^T X_c, (sum of out, in_c) float64."""
        self.micro_batch = 0

    def add(self, x: Tensor) -> None:
        """Add one micro-batch, x (tokens, in_c)."""
        if self.statistic is not None:
            self.statistic.add(x)
        if self.outputs is not None:
            self.cross += self.outputs.outputs(self.micro_batch).float().T @ x.float()
            if self.gram is not self.statistic:
                self.gram.add(x)
        self.micro_batch += 1

    def share(self) -> None:
        """Make the sums those of all ranks."""
        if self.statistic is not None:
            self.statistic.share()
        if self.outputs is not None:
            distributed.total(self.cross)
            if self.gram is not self.statistic:
                self.gram.share()


def output_residual(weight: Tensor, weight_error: Tensor, paired: Paired, rows: slice, damping: float) -> Tensor:
    """Equation 2. weight: W_c (out, in_c); weight_error: D_1 (out, in_c) float32.

    `rows`: where this linear's outputs lie in `paired.cross`. `damping`: share of the mean second moment.

    Returns:
        D, (out, in_c) float32; solved in float64.
    """
    tokens = paired.gram.tokens
    moments, damped = (Metric(paired.gram.matrix() / tokens, added).matrix for added in (0.0, damping))
    start = (weight.float() + weight_error).to(damped)
    missing = paired.cross[rows].float().to(damped) / tokens - start @ moments
    found: Tensor = in_one_thread(torch.linalg.solve, damped, B=missing.T).T
    return weight_error + found.to(weight_error)
