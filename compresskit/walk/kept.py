"""Inputs of the linear that ends a module, kept so that the module does not run again up to that linear.

A stage collects the inputs of an attention's or a feed-forward network's last linear, edits this linear and runs the block
again. What lies before the linear gives the same inputs again, bit for bit, so they are kept, as far as `KEPT_BYTES` goes;
the micro-batches beyond run in full.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.walk.cost import KEPT_BYTES
from compresskit.walk.hooks import SeenEnough, forward_replaced


@dataclass
class Kept:
    """A module, its last linear, and that linear's inputs by micro-batch, in order."""

    module: nn.Module
    linear: nn.Linear
    inputs: list[Tensor] = field(default_factory=list)
    others: int = -1
    """Number of values, all None, that the module returns after the linear's output; -1 if it returns that output alone."""
    usable: bool = False
    """Whether the module was seen to return the linear's output."""
    compared: bool = False
    """Whether the next run's first micro-batch says if they are usable: it runs in full, and has to give the same inputs."""

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Keep the linear's inputs in all runs of a context, as long as there is room."""
        full = False

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal full
            in_vain = bool(self.inputs) and not self.usable and not self.compared
            full = full or in_vain or sum(each.nbytes for each in self.inputs) + args[0].nbytes > KEPT_BYTES
            if not full:
                self.inputs.append(args[0].detach())

        handle = self.linear.register_forward_pre_hook(add)
        try:
            yield
        finally:
            handle.remove()
        if not self.usable and not self.compared:
            self.inputs.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Find out in one run, which ends with the module, whether the linear's output is what the module returns."""

        def end(*args: Any, **kwargs: Any) -> Any:
            self._watched(forward, args, kwargs)
            raise SeenEnough

        forward = self.module.forward
        with forward_replaced(self.module, end):
            yield

    def _watched(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Tensor | None, Any]:
        """Run the module and see if its result is the linear's output; (the linear's inputs, the result)."""
        seen: list[tuple[Tensor, Tensor, int]] = []
        handle = self.linear.register_forward_hook(lambda _, given, output: seen.append((given[0], output, output._version)))
        try:
            result = forward(*args, **kwargs)
        finally:
            handle.remove()
        first, *others = result if isinstance(result, tuple) else (result,)
        self.others = len(others) if isinstance(result, tuple) else -1
        self.usable = len(seen) == 1 and _is(first, *seen[0][1:]) and all(other is None for other in others)
        return (seen[0][0] if seen else None), result

    def instead_of(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The module's forward from the kept inputs, each of which is freed, and `forward` once there are no more."""

        def from_inputs(*args: Any, **kwargs: Any) -> Any:
            if not self.inputs:
                return forward(*args, **kwargs)
            if self.compared:
                return self._compared(forward, args, kwargs)
            output = self.linear(self.inputs.pop(0))
            return output if self.others < 0 else (output, *(None,) * self.others)

        return from_inputs

    def _compared(self, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the module in full, and use no more of what is kept if it is not what the linear gets."""
        inputs, result = self._watched(forward, args, kwargs)
        if not self.usable or inputs is None or not torch.equal(inputs, self.inputs.pop(0)):
            self.inputs.clear()
        self.compared = False
        return result

    def narrow(self, features: Tensor) -> None:
        """Keep only these features (count,) int64 of the inputs."""
        for number, each in enumerate(self.inputs):
            self.inputs[number] = each.index_select(-1, features)


def _is(value: Any, output: Tensor, version: int) -> bool:
    """Whether a value is a linear's output as it was then: the same memory in the same form, not written to since."""
    if not isinstance(value, Tensor) or value._version != version:
        return False
    place = (torch.Tensor.data_ptr, torch.Tensor.size, torch.Tensor.stride)
    return value.dtype == output.dtype and all(of(value) == of(output) for of in place)
