"""What calibration text shows of the experts of a block: who is chosen, with what weight, and how strong the outputs are.

    tokens_e    = |{t : e chosen for t}|                                                          (1)
    strength_e  = sum over those t of g_e(t) ||f_e(x_t)||_2                                       (2)

Both are of the tokens that the router sends to an expert, and g is what really multiplies its output: after the choice, the
normalisation and the scale of the family's own router.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresskit import distributed
from compresskit.models.experts import PlainExperts


class ExpertStatistics:
    """Sums over tokens by expert, (N,) float64; a micro-batch's are summed in float32."""

    def __init__(self, count: int, device: torch.device | str = "cpu"):
        self.tokens_of: Tensor = torch.zeros(count, dtype=torch.float64, device=device)
        self.weights: Tensor = torch.zeros_like(self.tokens_of)
        self.strengths: Tensor = torch.zeros_like(self.tokens_of)
        self.tokens = 0

    def add(self, expert: int, weights: Tensor, outputs: Tensor) -> None:
        """Add an expert's weights (tokens,) and its outputs before them (tokens, hidden), of the tokens that chose it."""
        weights = weights.float()
        self.tokens_of[expert] += len(weights)
        self.weights[expert] += weights.sum()
        self.strengths[expert] += (weights * outputs.float().norm(dim=-1)).sum()

    def share(self) -> None:
        """Make the sums those of all ranks."""
        self.tokens = distributed.total_of(self.tokens)
        for each in (self.tokens_of, self.weights, self.strengths):
            distributed.total(each)

    def weight_share(self, experts: list[int]) -> float:
        """The share of all weights that these experts have."""
        whole = float(self.weights.sum())
        return float(self.weights[experts].sum()) / whole if whole else 0.0


@contextmanager
def watched(experts: PlainExperts, seen: ExpertStatistics) -> Iterator[None]:
    """Add to the statistics whatever runs through the experts."""
    routed: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, chosen, weights = experts.arguments(args, kwargs)
        routed[:] = [chosen, weights]
        seen.tokens += len(hidden)

    def after(expert: int) -> Any:
        def add(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            chosen, weights = routed
            token, place = torch.where(chosen == expert)  # in the order in which `PlainExperts` runs them
            seen.add(expert, weights[token, place], output)

        return add

    with ExitStack() as stack:
        stack.callback(experts.register_forward_pre_hook(before, with_kwargs=True).remove)
        for expert in range(experts.count):
            stack.callback(experts.down(expert).register_forward_hook(after(expert)).remove)
        yield
