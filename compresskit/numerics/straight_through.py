"""Rounding that gradients pass unchanged (arXiv 1308.3432)."""

from __future__ import annotations

from torch import Tensor


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    """Return the value of `rounded` with the gradient of `exact`; all have the same shape."""
    return exact + (rounded - exact).detach()
