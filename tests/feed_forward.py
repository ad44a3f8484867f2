"""The sizes of the small feed-forward network that scores of channels are tested on."""

from __future__ import annotations

import torch

WIDTH, HIDDEN, TOKENS = 7, 4, 50
Ffn = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Gate, up, down, and what goes into down."""
