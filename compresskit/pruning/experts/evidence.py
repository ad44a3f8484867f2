"""What the methods that merge compare: router logits over the calibration text, and all experts' outputs on some of it.

    logits    sum_t l_t l_t^T                                                          (N, N)             (1)
    outputs   sum_t [p_i(t) f_i(x_t)] . [p_j(t) f_j(x_t)]                              (N, N)             (2)
    cosines   sum_t a_c(x_t) a_j(x_t)^T, divided by the norms over the tokens          (width, width)     (3)

l: router logits; p = softmax(l) over all experts; a: inputs of an expert's output projection. (2) and (3) are of a few windows,
on which every expert runs for every token: they compare functions, and enter no score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.models.experts import PlainExperts
from compresskit.walk.statistics import Gram

COMPARED_WINDOWS = 8
"""Calibration windows on which all experts run."""
TOKENS_AT_ONCE = 128
"""Tokens whose outputs of all experts are held at a time."""


class Router(NamedTuple):
    """The rows of a block's router."""

    weight: Tensor
    """(N, hidden) float32."""
    bias: Tensor | None
    """(N,) float32."""

    def logits(self, x: Tensor) -> Tensor:
        """(tokens, N) float32 for x (tokens, hidden)."""
        return torch.nn.functional.linear(x.float(), self.weight, self.bias)


class Evidence(NamedTuple):
    """What is known of how alike a block's experts are."""

    logits: Tensor
    """Equation 1, (N, N) float64."""
    outputs: Tensor | None = None
    """Equation 2, (N, N) float64, if the method needs it."""


def cosines(products: Tensor) -> Tensor:
    """Inner products (n, n) divided by the norms; 0 beside a zero vector."""
    norms = products.diagonal().clamp_min(0).sqrt()
    return products / (norms[:, None] * norms).clamp_min(torch.finfo(products.dtype).tiny)


def collect(router: Router, inputs: Sequence[Tensor]) -> Tensor:
    """Equation 1 over all ranks; `inputs`: those of the router, by micro-batch of this rank, (tokens, hidden)."""
    gram = Gram(len(router.weight), router.weight.device)
    for x in inputs:
        gram.add(router.logits(x))
    gram.share()
    return gram.matrix().double()


def compare_outputs(experts: PlainExperts, router: Router, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Equation 2 over all ranks; `batches`: inputs of the router and of the experts, (tokens, hidden) each."""
    found = torch.zeros(experts.count, experts.count, dtype=torch.float64, device=router.weight.device)
    for routed, hidden in batches:
        for start in range(0, len(hidden), TOKENS_AT_ONCE):
            tokens = slice(start, start + TOKENS_AT_ONCE)
            gates = router.logits(routed[tokens]).softmax(dim=-1)
            each = [
                experts.down(expert)(experts.inner(expert, hidden[tokens])).float() * gates[:, expert, None]
                for expert in range(experts.count)
            ]
            outputs = torch.stack(each).flatten(1)
            found += outputs @ outputs.T
    return distributed.total(found)


def compare_activations(experts: PlainExperts, core: int, other: int, compared: Sequence[Tensor]) -> Tensor:
    """Equation 3 over all ranks, (width, width) float64; `compared`: inputs of the experts, (tokens, hidden) each."""
    width = experts.down(core).in_features
    sums = torch.zeros(width, width + 2, dtype=torch.float64, device=experts.down(core).weight.device)
    for hidden in compared:
        ours, theirs = experts.inner(core, hidden).float(), experts.inner(other, hidden).float()
        sums[:, :width] += ours.T @ theirs
        sums[:, width] += ours.square().sum(dim=0)
        sums[:, width + 1] += theirs.square().sum(dim=0)
    distributed.total(sums)
    norms = sums[:, width, None] * sums[:, width + 1]
    return sums[:, :width] / norms.sqrt().clamp_min(torch.finfo(torch.float64).tiny)
