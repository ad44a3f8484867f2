"""Share a fine-tuning among ranks: the micro-batches of a step are dealt, their gradients added up in the order of one rank.

Every rank then makes the same step, and any number of them computes what one does, to the bit. An all-reduce, as of
DistributedDataParallel, adds in an order that depends on their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit import distributed


class SharedGradients:
    """The gradients of a step, summed over the micro-batches of all ranks; alone, autograd adds them itself.

    They travel in one row of numbers, with one more for each parameter that says whether there is a gradient: an optimiser
    leaves a parameter without one as it is.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self.parameters = parameters
        self.total: Tensor | None = None

    def add(self, together: int) -> None:
        """Add the gradients of micro-batches that ran at the same time, on the first `together` ranks."""
        if distributed.count() == 1:
            return
        found = [parameter.grad for parameter in self.parameters]
        has = torch.tensor([each is not None for each in found], device=self.parameters[0].device)
        rows = [
            torch.zeros_like(parameter) if each is None else each for parameter, each in zip(self.parameters, found, strict=True)
        ]
        own = torch.cat([*(row.flatten() for row in rows), has.to(rows[0])])
        if self.total is None:
            self.total = torch.zeros_like(own)
        distributed.add_everywhere(self.total, own, together)
        for parameter in self.parameters:
            parameter.grad = None

    def set(self) -> None:
        """Give every parameter its sum."""
        if self.total is None:
            return
        sizes = [parameter.numel() for parameter in self.parameters]
        *sums, has = torch.split(self.total, [*sizes, len(sizes)])
        for parameter, value, known in zip(self.parameters, sums, has.tolist(), strict=True):
            parameter.grad = value.view_as(parameter) if known else None
