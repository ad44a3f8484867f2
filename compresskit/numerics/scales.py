"""Scales in the dtype in which files store them."""

from __future__ import annotations

import torch
from torch import Tensor

HALF_STEPS = 2**24
"""Below its normal numbers, 6.1e-5, a half is a whole number of steps of 2^-24, 6.0e-8."""


def rounded_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round scales of any shape to their stored dtype and return float32; 0 becomes the dtype's smallest normal number."""
    limits = torch.finfo(scale_dtype)
    found = scale.clamp(limits.smallest_normal, limits.max).to(scale_dtype).float()
    if scale_dtype != torch.float16:
        return found
    small = (scale > 0) & (scale < limits.smallest_normal)
    return torch.where(small, (scale * HALF_STEPS).ceil() / HALF_STEPS, found)  # up, so that the range stays on the grid
