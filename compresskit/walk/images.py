"""Windows with images in a walk: what the model is given beside their tokens, and what it adds between its blocks.

The towers run once, while the first hidden states are captured. Some models (Qwen3-VL) also add features of the image to
the outputs of their first blocks. These sums do not depend on the outputs, so the recording blocks return zeros, and what
arrives at the next one is the sum itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compresskit.errors import UnsupportedArchitecture
from compresskit.models.model import Model
from compresskit.walk.calls import Call, Calls, shared_call

Images = Mapping[bytes, dict[str, Tensor]]
"""Inputs of the model beside the tokens, by the bytes of a window's tokens (length,) int64; windows of text are not in it."""


def inputs_of(
    images: Images, batch: Tensor, network: PreTrainedModel, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What the base model is given beside the tokens of a micro-batch, floats in `dtype`; {} for text."""
    found = images.get(batch.numpy().tobytes()) if images else None
    taken = inspect.signature(network.base_model.forward).parameters
    return {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in (found or {}).items()
        if name in taken
    }


def image_note_taker(calls: Calls, inputs: list[Tensor] | None, returned: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The forward of a recording block for a window with images."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        call = shared_call(args, kwargs, calls)
        if inputs is not None:
            inputs.append(hidden_states)
        elif bool(hidden_states.any()):
            call = Call(args, kwargs, hidden_states)
        calls.append(call)
        return returned(torch.zeros_like(hidden_states))

    return forward


def add_between(hidden: list[Tensor], calls: Calls) -> None:
    """Add what the model adds on the way to a block to the block's inputs, in place of the list's tensors."""
    for number, call in enumerate(calls):
        if call.added is not None:
            hidden[number] = hidden[number] + call.added


def check_runs(model: Model, calls: list[Calls], micro_batches: int) -> None:
    """Raise UnsupportedArchitecture if a block runs on windows with images alone (cross-attention); 0: there are none."""
    for index, each in enumerate(calls):
        if 0 < len(each) < micro_batches:
            raise UnsupportedArchitecture(
                f"{model.checkpoint.folder}: {model.block_name(index)} runs on windows with images alone, which no stage can "
                "mix with text; calibrate this model on text"
            )
