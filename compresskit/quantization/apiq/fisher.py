"""Diagonal Fisher information of the linears' weights and of the blocks' outputs, with one block in memory.

    F_W = mean over windows of (d loss / d W)^2,    loss = mean cross-entropy of a window           (arXiv 2504.13932, section 3)
    f_c = mean over tokens of (d loss / d h_c)^2    for each channel c of a block's output h

The reverse walk (backward.py) gives the gradients. The results are stored in a scratch folder, one number per weight and channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from compresskit import distributed
from compresskit.models.processor import image_tokens
from compresskit.walk.backward import GradientStep, walk_backward
from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock
from compresskit.walk.walk import Walk

IGNORED = -100
"""In place of a token that is not to be predicted."""


def fisher_diagonals(walk: Walk, names: list[str], scratch: Path, on_block: OnBlock) -> Callable[[int], Mapping[str, Tensor]]:
    """Compute the diagonals of the named linears and of every block's output, and store them in `scratch`.

    `walk` has one window per micro-batch.

    Returns:
        A function from a block's index to its diagonals: by plain name (out, in) of the linears, and (hidden,) float32 under
        the block's name, on the walk's device; the loss is in nats.

    Raises:
        NumericalError: activations are not finite.
    """

    @contextmanager
    def visit(block: Block) -> Iterator[GradientStep]:
        own = [name for name in names if name.startswith(block.name + ".")]
        weights = {name.removeprefix(block.name + ".") + ".weight": block.linear(name).weight for name in own}
        leaves = {leaf: weight.detach().requires_grad_(True) for leaf, weight in weights.items()}
        sums = {name: torch.zeros_like(weight) for name, weight in zip(own, weights.values(), strict=True)}
        channels = torch.zeros(walk.model.hidden_size, device=walk.device)
        totals, ran = [*sums.values(), channels], 0

        def add(squares: Sequence[Tensor | None]) -> None:
            """Add those of the windows that ran at the same time, one a rank, in the order of the windows."""
            nonlocal ran
            together = min(distributed.count(), block.micro_batches - ran)
            for total, square in zip(totals, squares, strict=True):
                distributed.add_everywhere(total, square, together)
            ran += together

        def step(given: Tensor, gradient: Tensor, number: int) -> Tensor:
            with torch.enable_grad():
                output = block.run_with(given, number, leaves)
            found = torch.autograd.grad(output, [given, *leaves.values()], gradient, allow_unused=True)
            # None: no token of this window reached the expert.
            squares = [
                torch.zeros_like(leaf) if each is None else each.square()
                for each, leaf in zip(found[1:], leaves.values(), strict=True)
            ]
            add([*squares, gradient.float().square().flatten(0, -2).mean(dim=0)])
            assert found[0] is not None
            return found[0]

        yield step
        if ran < block.micro_batches:  # the last windows were those of other ranks
            add([None] * len(totals))
        means = {name: total / block.micro_batches for name, total in {**sums, block.name: channels}.items()}
        save_file(means, scratch / f"fisher-{block.index}.safetensors")

    walk_backward(walk, scratch, on_block, partial(_mean_loss, image_tokens(walk.model)), visit)
    return lambda index: load_file(scratch / f"fisher-{index}.safetensors", device=str(walk.device))


def _mean_loss(placeholders: list[int], tokens: Tensor, logits: Tensor) -> Tensor:
    """Mean cross-entropy of a window without the places of images: tokens (1, length), logits (1, length, vocabulary)."""
    images = torch.isin(tokens, torch.tensor(placeholders, dtype=tokens.dtype))
    wanted = tokens.masked_fill(images, IGNORED)[0, 1:]
    return functional.cross_entropy(logits[0, :-1], wanted.to(logits.device), ignore_index=IGNORED)
