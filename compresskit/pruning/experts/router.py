"""Refit the router's rows of merged experts: a group is to be chosen as often as its members were.

    d_g(t) = log sum_{i in g} exp l_i(t) - l_c(t) - s ,    s = min over groups of the mean of d over t                (1)
    w_g    = w_c + argmin_v sum_t (v . x_t - d_g(t))^2 + eps ||v||^2 = w_c + (sum_t d_g x_t^T) (C + eps I)^-1           (2)

symbol   meaning                                            shape             name here
x_t      inputs of the router, with a 1 if it has biases    (tokens, hidden)  inputs
l        router logits, c the expert that stays of group g  (tokens, N)       logits
C        sum_t x_t x_t^T                                                      gram
eps      ridge * mean(diag C)

A softmax does not see the shift s. Without it equal groups would be pushed to learn the same constant from x. (1) holds where the
weights of the chosen experts are in the proportion exp(l): other routers keep the rows of c. No paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from compresskit import distributed
from compresskit.pruning.experts.evidence import Router
from compresskit.pruning.experts.refit import Routed, solved

CLOSE = 0.02
"""Largest mean difference between the logarithm of two weights' ratio and that of a softmax: a little more than 16 bits leave."""


def is_softmax(router: Router, inputs: Tensor, routed: Routed) -> bool:
    """Whether the weights of the chosen experts are in the proportion of a softmax of the logits; so if one is chosen."""
    logits = router.logits(inputs).gather(1, routed.chosen)
    weights = routed.weights.float().log()
    apart = (weights - weights[:, :1]) - (logits - logits[:, :1])
    return bool(apart.abs().mean() < CLOSE)


def refit_router(router: Router, inputs: Sequence[Tensor], groups: Sequence[Sequence[int]], ridge: float) -> Router:
    """Equations 1 and 2; `inputs`: those of the router by micro-batch of this rank, `groups`: the expert that stays first.

    Returns:
        The rows of the groups, in their order.

    Raises:
        NumericalError: the system of equation 2 is not positive definite.
    """
    cores = torch.tensor([group[0] for group in groups], device=router.weight.device)
    size = router.weight.shape[1] + (router.bias is not None)
    sums = torch.zeros(size + len(groups) + 1, size, dtype=torch.float64, device=router.weight.device)
    means = torch.zeros(len(groups) + 1, dtype=torch.float64, device=router.weight.device)
    for batch in inputs:
        x = batch.float()
        x = x if router.bias is None else torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        logits = router.logits(batch)
        gains = torch.stack([logits[:, list(group)].logsumexp(dim=1) - logits[:, group[0]] for group in groups], dim=1)
        sums[:size] += x.T @ x
        sums[size:-1] += gains.T @ x
        sums[-1] += x.sum(dim=0)
        means[:-1] += gains.sum(dim=0)
        means[-1] += len(x)
    distributed.total(sums)
    distributed.total(means)
    gram, cross = sums[:size], sums[size:-1]
    shift = float(means[:-1].min() / means[-1].clamp_min(1))
    eps = ridge * gram.diagonal().mean()
    bias = None if router.bias is None else router.bias[cores]
    if eps == 0 or not math.isfinite(shift):
        return Router(router.weight[cores], bias)
    change = solved(gram, cross - shift * sums[-1], eps)
    hidden = router.weight.shape[1]
    return Router(router.weight[cores] + change[:, :hidden], None if bias is None else bias + change[:, hidden])
