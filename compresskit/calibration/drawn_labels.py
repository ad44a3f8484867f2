"""The loss whose gradient's second moments are the Fisher information: labels are drawn from the model itself.

    loss = -sum over positions of log p(y),    y drawn from p                                        (1)

With the labels of the text instead the squares of the gradient are the empirical Fisher, which is not the Hessian of the KL
divergence (Kunstner et al., arXiv 1905.12558).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from compresskit.calibration.sampling import pick

ROWS_AT_ONCE = 64
"""Positions whose float64 distributions exist at the same time."""
IGNORED = -100
"""In place of a label that is not to be predicted."""


def drawn_loss(generators: Iterator[torch.Generator], unpredicted: list[int] | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """Make equation 1 a function, called with one window after the other; each draws with the next generator.

    Positions before a token of `unpredicted` do not count: the model predicts no places of images.

    Returns:
        function(tokens (1, length), logits (1, length, vocabulary) float32) -> the loss in nats, a number.
    """
    skipped = torch.tensor(unpredicted or [], dtype=torch.int64)

    def loss(tokens: Tensor, logits: Tensor) -> Tensor:
        rows, generator = logits.flatten(0, -2), next(generators)
        uniform = torch.rand(len(rows), 1, dtype=torch.float64, generator=generator)
        parts = zip(torch.split(rows.detach(), ROWS_AT_ONCE), torch.split(uniform, ROWS_AT_ONCE), strict=True)
        drawn = torch.cat([pick(*part) for part in parts])
        drawn[:-1].masked_fill_(torch.isin(tokens.flatten()[1:].cpu(), skipped), IGNORED)
        return functional.cross_entropy(rows, drawn.to(rows.device), ignore_index=IGNORED, reduction="sum")

    return loss
