"""Measure how an error in each output of the original's linears affects its predictions.

    KL(p || p after an error e in z)  ~  1/2 e^T F e,    F = E[(d log p(y) / d z)(d log p(y) / d z)^T],  y drawn from p     (1)
    g_i = mean over tokens of (d log p(y) / d z_i)^2                                 the diagonal of F, a number an output

symbol  meaning                                             shape
z       a linear's output at a token                        (out,)
p       the original's predictions from there on
y       tokens drawn from p, one for every position
g       diag(F): squares of the gradient, averaged          (out,)

Equation 1 is the second-order expansion around the original, where the first order is 0 (Amari, Natural Gradient Works
Efficiently in Learning, 1998, section 3). It is not part of EoRA, which weights all outputs equally. The terms left out of
the expansion grow with the error; docs/evidence/compensate.md has measurements at 3 and 2 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import repeat
from pathlib import Path

import torch
from torch import Tensor

from compresskit.calibration.drawn_labels import drawn_loss
from compresskit.walk.backward import GradientStep, through, walk_backward
from compresskit.walk.block import Block
from compresskit.walk.hooks import recorded_gradients
from compresskit.walk.sequence import OnBlock
from compresskit.walk.statistics import Moments
from compresskit.walk.walk import Walk

DAMPING = 0.1
"""Share of the mean that is added to every value, so that outputs that the text hardly uses keep some weight."""
LEAST = 1e-30
"""Value for experts that no token reached and for padded outputs; above 0, because the solver divides by it."""


def output_weights(walk: Walk, names: Sequence[str], scratch: Path, on_block: OnBlock, seed: int) -> dict[str, Tensor]:
    """Compute the damped values g of the original's named linears. `walk` is of the original, with one window per micro-batch.

    Returns:
        By plain name (out,) float64 on the CPU, in nats over squared units of the output.

    Raises:
        NumericalError: activations are not finite.
    """
    found: dict[str, Tensor] = {}
    device = torch.device("cpu") if walk.device.type == "mps" else walk.device  # mps has no float64

    @contextmanager
    def visit(block: Block) -> Iterator[GradientStep]:
        own = [name for name in names if name.startswith(block.name + ".")]
        moments = {name: Moments(block.linear(name).out_features, device) for name in own}

        with ExitStack() as stack:
            for name, moment in moments.items():
                stack.enter_context(recorded_gradients(block.linear(name), _adding(moment)))
            yield through(block)
        tokens = sum(hidden[..., 0].numel() for hidden in block.hidden)
        for name, moment in moments.items():
            squares = (moment.squares / tokens).cpu()
            found[name] = (squares + DAMPING * squares.mean()).clamp_min(LEAST)

    drawn = drawn_loss(repeat(torch.Generator().manual_seed(seed)))
    walk_backward(walk, scratch, on_block, drawn, visit)
    return found


def _adding(moment: Moments) -> Callable[[Tensor], None]:
    """What adds gradients (tokens, out) to a moment, on its device."""
    return lambda gradient: moment.add(gradient.to(moment.sum.device))
