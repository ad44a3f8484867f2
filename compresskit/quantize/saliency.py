"""Diagonal Fisher information of the linears' weights, for models of any size: one block in memory, there and back.

    F_W = mean over windows of (d loss / d W)^2,    loss = mean cross-entropy of a window           (arXiv 2504.13932, section 3)

Forward, the walk keeps every block's inputs on disk; the head gives the gradient of the loss with respect to the last
hidden states; then the blocks come again in reverse order, each run once more with gradients. Inputs and results lie in
a scratch folder: windows x length x hidden x blocks numbers, and as many as the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from compresskit.stagewise import OnBlock
from compresskit.walk import Walk


def fisher_diagonals(walk: Walk, names: list[str], scratch: Path, on_block: OnBlock) -> Callable[[int], Mapping[str, Tensor]]:
    """The diagonals of the named linears, kept in the folder `scratch`. `walk`: one window a micro-batch.

    Returns:
        Index of a block -> its diagonals by plain name, (out, in) each, in the dtype of the walk; the loss is in nats.

    Raises:
        NumericalError: activations are not finite.
    """
    count = walk.model.block_count
    calls = []
    for block in walk:
        save_file(_numbered(block.hidden), scratch / f"inputs-{block.index}.safetensors")
        calls.append(block.calls)
        on_block("forward", block.index + 1, count)
    gradients = [_head_gradient(*pair) for pair in walk.heads()]
    for index in reversed(range(count)):
        inputs = load_file(scratch / f"inputs-{index}.safetensors")
        (scratch / f"inputs-{index}.safetensors").unlink()
        with walk.block(index, [inputs[str(i)] for i in range(len(inputs))], calls[index]) as block:
            own = [name for name in names if name.startswith(block.name + ".")]
            weights = {name.removeprefix(block.name + ".") + ".weight": block.linear(name).weight for name in own}
            leaves = {leaf: weight.detach().requires_grad_(True) for leaf, weight in weights.items()}
            sums = {name: torch.zeros_like(weight) for name, weight in zip(own, weights.values(), strict=True)}
            for number, hidden in enumerate(block.hidden):
                given = hidden.detach().requires_grad_(True)
                with torch.enable_grad():
                    output = block.run_with(given, leaves)
                found = torch.autograd.grad(output, [given, *leaves.values()], gradients[number], allow_unused=True)
                assert found[0] is not None
                gradients[number] = found[0]
                for total, gradient in zip(sums.values(), found[1:], strict=True):
                    if gradient is not None:  # no token of this window reached the expert
                        total.add_(gradient.square())
            save_file({name: total / len(block.hidden) for name, total in sums.items()}, scratch / f"fisher-{index}.safetensors")
        on_block("backward", count - index, count)
    return lambda index: load_file(scratch / f"fisher-{index}.safetensors")


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(index): tensor.cpu().contiguous() for index, tensor in enumerate(tensors)}


def _head_gradient(tokens: Tensor, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """The gradient d loss / d hidden of one window, (1, length, hidden); tokens (1, length)."""
    given = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = head(given).float()
        loss = functional.cross_entropy(logits[0, :-1], tokens[0, 1:].to(logits.device))
    return torch.autograd.grad(loss, given)[0]
