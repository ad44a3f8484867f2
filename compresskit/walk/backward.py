"""Backpropagate a loss through a model of any size with one block in memory.

The forward walk saves every block's inputs to disk. The head then gives the gradient of the loss with respect to the last
hidden states. Finally, the blocks run again in reverse order with gradients. The saved inputs take windows x length x
hidden x blocks numbers in a scratch folder.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresskit.walk.block import Block
from compresskit.walk.sequence import OnBlock
from compresskit.walk.walk import Walk

Loss = Callable[[Tensor, Tensor], Tensor]
"""function(tokens (1, length), logits (1, length, vocabulary) float32) -> a number."""
GradientStep = Callable[[Tensor, Tensor, int], Tensor]
"""function(one window's inputs of a block, requiring gradients, d loss / d its outputs, its number) -> d loss / d its inputs."""


def walk_backward(
    walk: Walk, scratch: Path, on_block: OnBlock, loss: Loss, visit: Callable[[Block], AbstractContextManager[GradientStep]]
) -> None:
    """Run the model forward, then run its blocks in reverse order with gradients.

    `walk` must have one window per micro-batch. `visit(block)` is entered once per block and returns the function that
    backpropagates each window through it; that function may record the gradients it needs.

    Raises:
        NumericalError: activations are not finite.
    """
    count = walk.model.block_count
    calls = []
    for block in walk:
        save_file(_numbered(block.hidden), scratch / f"inputs-{block.index}.safetensors")
        calls.append(block.calls)
        on_block("forward", block.index + 1, count)
    gradients = [_head_gradient(loss, *each) for each in walk.heads()]
    for index in reversed(range(count)):
        inputs = load_file(scratch / f"inputs-{index}.safetensors")
        (scratch / f"inputs-{index}.safetensors").unlink()
        hidden = [inputs[str(i)] for i in range(len(inputs))]
        with walk.block(index, hidden, calls[index]) as block, visit(block) as step:
            for number, window in enumerate(block.hidden):
                gradients[number] = step(window.detach().requires_grad_(True), gradients[number], number)
        on_block("backward", count - index, count)


def through(block: Block) -> GradientStep:
    """The step that backpropagates a window through the whole block, for a `visit` that only watches."""

    def step(given: Tensor, gradient: Tensor, number: int) -> Tensor:
        with torch.enable_grad():
            output = block.run(given, number)
        return torch.autograd.grad(output, given, gradient)[0]

    return step


def _numbered(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(index): tensor.cpu().contiguous() for index, tensor in enumerate(tensors)}


def _head_gradient(loss: Loss, tokens: Tensor, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
    """Compute d loss / d hidden of one window, (1, length, hidden)."""
    given = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        value = loss(tokens, head(given).float())
    return torch.autograd.grad(value, given)[0]
