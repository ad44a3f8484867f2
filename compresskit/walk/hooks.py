"""What is hooked into a block's modules while it runs: inputs that are recorded, outputs that are kept or given again."""

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
