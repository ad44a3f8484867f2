"""A span: consecutive blocks that are trained together, with their inputs and what they learn.

A loss is a function(output of the span (1, length, hidden), number of the micro-batch) -> (sum of the losses at the micro-batch's
places, number of these places). A span learns the original's hidden states, equation 1 of spans.py, the last one its predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresskit.errors import NumericalError
from compresskit.machine.precision import Precision, matrix_products
from compresskit.numerics.token_errors import token_errors, usual_energy
from compresskit.recovery.training.batches import History
from compresskit.recovery.training.steps import losses_of
from compresskit.walk.block import Block

BETAS = (0.9, 0.95)
"""AdamW's, as for the blocks of apiq: in few steps the second moments must adapt faster than by default."""
SMALLEST_GRADIENT = 1e-12
"""AdamW's eps: the gradients of a relative error are far smaller than the default expects."""

Loss = Callable[[Tensor, int], tuple[Tensor, int]]


def hidden_loss(targets: Sequence[Tensor]) -> Loss:
    """The capped relative error of every token; targets (1, length, hidden) by micro-batch."""
    least = usual_energy(targets, None)

    def loss(output: Tensor, number: int) -> tuple[Tensor, int]:
        errors = token_errors(output, targets[number], None, least)
        return errors.sum(), errors.numel()

    return loss


def predicted_loss(head: Callable[[Tensor], Tensor], make_batch: Callable[[int], dict[str, Tensor]]) -> Loss:
    """The loss of the whole network, in nats.

    `head` maps hidden states (1, places, hidden) to logits; `make_batch` builds a micro-batch as `batch_of` does.

    Returns:
        The loss.
    """

    def loss(output: Tensor, number: int) -> tuple[Tensor, int]:
        batch = {name: value.to(output.device) for name, value in make_batch(number).items()}
        losses = losses_of(head(output[..., batch["kept"], :]), batch)
        return losses.sum(), losses.numel()

    return loss


@dataclass(frozen=True)
class Span:
    """Consecutive blocks with their inputs and what they learn."""

    blocks: Sequence[Block]
    """Those through which text runs."""
    inputs: Sequence[Tensor]
    """(1, length, hidden) by micro-batch."""
    loss: Loss
    precision: Precision

    def summed_loss(self, number: int) -> tuple[Tensor, int]:
        """(sum of a micro-batch's losses, number of its places); raises NumericalError if it is not finite."""
        hidden = self.inputs[number]
        with matrix_products(hidden.device, self.precision):
            for block in self.blocks:
                hidden = block.run(hidden, number)
            total, places = self.loss(hidden, number)
        if not bool(total.isfinite()):
            name = self.blocks[-1].name if self.blocks else "the head"
            raise NumericalError(f"{name}: the loss is {float(total.detach())}")
        return total, places

    @torch.no_grad()
    def mean_loss(self, numbers: Sequence[int]) -> float:
        """Mean loss over the places of these micro-batches."""
        found = [(float(total), places) for total, places in map(self.summed_loss, numbers)]
        return sum(total for total, _ in found) / sum(places for _, places in found)


def train_span(span: Span, groups: list[dict[str, Any]], steps: Sequence[Sequence[int]]) -> History:
    """Train the parameters of these groups of an optimiser in place; their rates fall linearly to 0.

    `steps`: the micro-batches of each step.

    Returns:
        The losses.

    Raises:
        NumericalError: the loss became NaN or infinity.
    """
    optimizer = torch.optim.AdamW(groups, betas=BETAS, eps=SMALLEST_GRADIENT, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(steps))
    history: History = []
    for numbers in steps:
        total, places = _add_gradients(span, numbers)
        for gradient in (p.grad for group in groups for p in group["params"] if p.grad is not None):
            gradient.div_(places)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        history.append({"loss": total / places, "tokens": places})
    return history


def _add_gradients(span: Span, numbers: Sequence[int]) -> tuple[float, int]:
    """Add the gradients of the summed loss of these micro-batches; returns that and the number of places."""
    sums, counts = 0.0, 0
    for number in numbers:
        with torch.enable_grad():
            total, places = span.summed_loss(number)
        torch.autograd.backward(total)
        sums, counts = sums + float(total.detach()), counts + places
    return sums, counts
