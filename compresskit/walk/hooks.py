"""What is hooked into a block's modules while it runs: recorded inputs and gradients, outputs that are kept or given again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn


class Statistic(Protocol):
    """Sum over tokens that `Block.collect` fills."""

    def add(self, x: Tensor) -> None:
        """Add the linear's inputs for one micro-batch, x (tokens, in)."""

    def share(self) -> None:
        """Make it the statistic of all ranks' micro-batches."""


class SeenEnough(Exception):
    """Stops a block's run early when its output is not needed."""


@contextmanager
def recorded_inputs(linear: nn.Module, add: Callable[[Tensor], None], stop: bool) -> Iterator[None]:
    """Give the inputs of a linear, or of a router, (tokens, in), to `add`; `stop`: and end the block's run."""

    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(args[0].detach().flatten(0, -2))
        if stop:
            raise SeenEnough

    handle = linear.register_forward_pre_hook(record)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recorded_gradients(linear: nn.Linear, add: Callable[[Tensor], None]) -> Iterator[None]:
    """Give the gradients that reach a linear's outputs, (tokens, out), to `add` while a run is backpropagated."""

    def record(gradient: Tensor) -> None:
        add(gradient.detach().flatten(0, -2))

    def watch(_: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(record)  # type: ignore[no-untyped-call]

    handle = linear.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


def keeping(forward: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    """A forward that also appends what it returns to a list."""

    def run(*args: Any, **kwargs: Any) -> Any:
        kept.append(forward(*args, **kwargs))
        return kept[-1]

    return run


def replaying(kept: list[Any]) -> Callable[..., Any]:
    """Return the kept outputs in order, freeing each."""
    return lambda *args, **kwargs: kept.pop(0)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the module's forward, also one that replaces it already, but keep the module and its attributes in place."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
