"""The arguments with which the model calls its blocks, captured micro-batch by micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Call:
    """Arguments of one block call, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    added: Tensor | None = None
    """What the model adds to the previous block's output on the way to this block, None for nothing."""


Calls = list[Call]
"""A block's call arguments by micro-batch; micro-batches with equal arguments share them. Empty for a block that never runs."""


def shared_call(args: tuple[Any, ...], kwargs: dict[str, Any], calls: Calls) -> Call:
    """Find an earlier call of the block with the same arguments, so that masks are held once.

    Returns:
        That call, or a new one.
    """
    for known in calls[:1] + calls[-1:]:
        if known.added is None and _same((known.args, known.kwargs), (args, kwargs)):
            return known
    return Call(args, kwargs)


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and bool(torch.equal(first, second))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict):
        # Blocks may leave something in a dictionary for later ones; an empty one is never shared.
        return bool(first) and first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return isinstance(first, (bool, int, float, str, type(None))) and bool(first == second)


def note_taker(calls: Calls, inputs: list[Tensor] | None, returned: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Stands for a block: notes its arguments, and its `inputs` if asked, and hands its input on."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(shared_call(args, kwargs, calls))
        if inputs is not None:
            inputs.append(hidden_states)
        return returned(hidden_states)

    return forward


def passing_on(hidden: Tensor | None, returned: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """Stands for a block: gives `hidden`, or hands its input on."""
    return lambda hidden_states, *args, **kwargs: returned(hidden_states if hidden is None else hidden)
