"""Guided second moments: a token counts as much as the predictions depend on a linear's output there.

GuidedQuant, arXiv 2505.07004, section 3. To second order an error dW of one linear's weight costs

    KL(p || p')  ~  1/2 sum over tokens of (x^T dW^T g)^2,       g = d log p(y) / d z,  y drawn from p                      (1)

Of the cross terms between rows nothing is kept, and the rows of a group J_k share the mean of their squares:

    KL  ~  1/2 sum_k tr(dW_k H_k dW_k^T),      H_k = sum over tokens of w_tk x x^T                                          (2)
    w_tk = mean over the rows j of J_k of g_tj^2                                                                            (3)

symbol  meaning                                                    shape
x       the linear's input, after the quantised blocks before it   (in,)
z       the linear's output in the original                        (out,)
dW_k    the error of the rows of group k                           (rows, in)
w_tk    stored by window                                           (windows, tokens, groups)

Rounding with error feedback (error_feedback.py) then minimises equation 2 with H_k for the rows of group k.

Differs from the paper: the labels y are drawn from the original (drawn_labels.py), so that equation 1 is the KL divergence's
own Hessian; the paper takes those of the text. The largest weights are capped (`CAP`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresskit import distributed
from compresskit.calibration.drawn_labels import drawn_loss
from compresskit.errors import NumericalError
from compresskit.machine.device import Where
from compresskit.machine.precision import matrix_products
from compresskit.models.processor import image_tokens
from compresskit.quantization.cost import guide_windows
from compresskit.quantization.request import QuantizeRequest
from compresskit.walk.backward import GradientStep, through, walk_backward
from compresskit.walk.block import Block
from compresskit.walk.hooks import recorded_gradients
from compresskit.walk.sequence import OnBlock
from compresskit.walk.walk import Walk

TokenWeights = Mapping[str, Sequence[Sequence[Tensor]]]
"""By plain name of a block's linears, group of their rows and micro-batch of this rank: (tokens,) float32, of mean 1 over all."""
Guide = Callable[[int], TokenWeights]
"""function(a block's index) -> the weights of the tokens, or nothing."""
CAP = 0.999
"""Share of the tokens whose weight is below the cap: a few first tokens would otherwise be most of the sum."""


def guide_of(request: QuantizeRequest, walk: Walk, where: Where, scratch: Path, on_block: OnBlock) -> Guide:
    """Backpropagate drawn labels through the original, and keep equation 3 of the request's linears in `scratch`.

    `walk` is the one that will collect the second moments; the guide is by its micro-batches. The original runs in float32,
    its products of matrices in bfloat16 where the device multiplies that faster; both have the exponents of float32, so no
    gradient underflows.

    Returns:
        The guide, which reads `scratch`.

    Raises:
        NumericalError: activations are not finite, or a linear does not see every window.
    """
    names, groups, seed = list(request.schemes), request.method.guide_rows, request.options.seed
    tokens = torch.cat(walk.all_batches)
    size = guide_windows(tokens.shape[1])
    for first in range(0, len(tokens), size):
        part = Walk(walk.model, tokens[first : first + size], where._replace(dtype=torch.float32), 1, walk.images)
        generators = (torch.Generator().manual_seed(seed + first + number) for number in part.numbers)
        with matrix_products(walk.device, "auto"):
            loss = drawn_loss(generators, image_tokens(walk.model))
            walk_backward(part, scratch, on_block, loss, _visitor(names, groups, scratch, first))
    sizes = [len(batch) for batch in walk.all_batches]

    def guide(index: int) -> dict[str, list[list[Tensor]]]:
        found = _weights([load_file(scratch / _file(index, first)) for first in range(0, len(tokens), size)])
        return {name: [_own_batches(group, sizes, walk.numbers) for group in each.unbind(dim=2)] for name, each in found.items()}

    return guide


def _own_batches(weights: Tensor, sizes: list[int], numbers: Sequence[int]) -> list[Tensor]:
    """Of weights (windows, tokens) those of the micro-batches with these numbers, (tokens,) each; `sizes`: of all of them."""
    parts = torch.split(weights, sizes)
    return [parts[number].flatten() for number in numbers]


def _file(index: int, first: int) -> str:
    return f"guide-{index}-{first}.safetensors"


def _visitor(
    names: Sequence[str], groups: int, scratch: Path, first: int
) -> Callable[[Block], AbstractContextManager[GradientStep]]:
    """What runs a block's windows backwards and stores what reached the outputs of its named linears."""

    @contextmanager
    def visit(block: Block) -> Iterator[GradientStep]:
        own: dict[str, list[Tensor]] = {name: [] for name in names if name.startswith(block.name + ".")}

        with ExitStack() as stack:
            for name, found in own.items():
                stack.enter_context(recorded_gradients(block.linear(name), _adding(found, groups)))
            yield through(block)
        save_file(_of_all_ranks(own, block.micro_batches), scratch / _file(block.index, first))

    return visit


def _adding(found: list[Tensor], groups: int) -> Callable[[Tensor], None]:
    """What appends equation 3 of gradients (tokens, out) to a list, (tokens, groups)."""

    def add(gradient: Tensor) -> None:
        squares = gradient.float().square()
        found.append(torch.stack([part.mean(dim=1) for part in squares.tensor_split(groups, dim=1)], dim=1).cpu())

    return add


def _of_all_ranks(own: Mapping[str, list[Tensor]], windows: int) -> dict[str, Tensor]:
    """The weights of all windows, (windows, tokens, groups); a linear that no window reached is left out."""
    found = {}
    for name, weights in own.items():
        seen = [length for each in distributed.every([len(window) for window in weights]) for length in each]
        if len(seen) not in (0, windows) or len(set(seen)) > 1:
            raise NumericalError(f"{name}: not all windows run through it with the same number of tokens; pass --guide none")
        if seen:
            found[name] = torch.stack(distributed.in_order(weights, windows))
    return found


def _weights(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Cap and normalise the weights of one block; `parts`: one after the other in the windows."""
    found = {}
    for name in parts[0]:
        weights = torch.cat([part[name] for part in parts])
        tokens = weights.flatten(0, 1)
        cap = tokens.kthvalue(max(1, int(CAP * len(tokens))), dim=0).values
        capped = torch.minimum(weights, cap)
        mean = capped.mean(dim=(0, 1))
        found[name] = torch.where(mean > 0, capped / mean, 1.0)  # 0: no prediction depends on these rows
    return found
