"""One decoder block with its weights in memory: its inputs, how the model calls it, and what can be seen while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compresskit.errors import NumericalError
from compresskit.machine.memory import release_freed_memory


class Statistic(Protocol):
    """What `Block.collect` fills: a sum over tokens."""

    def add(self, x: Tensor) -> None:
        """Add the inputs of the linear in one micro-batch, x (tokens, in)."""


@dataclass
class Call:
    """The arguments, besides the hidden states, with which the model calls one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


Calls = dict[tuple[int, int], Call]
"""A block's arguments by the shape of the micro-batch, (samples, length)."""


def shape_of(hidden: Tensor) -> tuple[int, int]:
    """Hidden states (samples, length, hidden) -> (samples, length)."""
    return hidden.shape[0], hidden.shape[1]


@dataclass
class Block:
    """One decoder block with its weights in memory, in plain form."""

    index: int
    name: str
    module: nn.Module
    hidden: list[Tensor]
    """The block's inputs, one (batch, length, hidden) tensor a micro-batch."""
    calls: Calls
    attention: str
    """Path of the attention module inside the block."""
    advanced: bool = field(default=False)
    remembered: list[Any] = field(default_factory=list)
    """Outputs of the attention, one a micro-batch, where `collect` was asked to keep them."""

    def linear(self, name: str) -> nn.Linear:
        """The linear with this plain name of the whole model."""
        found = self.module.get_submodule(name.removeprefix(self.name + "."))
        assert isinstance(found, nn.Linear)
        return found

    def run(self, hidden: Tensor) -> Tensor:
        """(batch, length, hidden) -> the same, through the block as it now is; NumericalError where that is not finite."""
        call = self.calls[shape_of(hidden)]
        return self._checked(self.module(hidden, *call.args, **call.kwargs))

    def run_with(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The same with other weights, by their names inside the block; gradients flow to them."""
        call = self.calls[shape_of(hidden)]
        return self._checked(torch.func.functional_call(self.module, dict(weights), (hidden, *call.args), call.kwargs))

    def _checked(self, output: Any) -> Tensor:
        # Blocks return the tensor itself, but GPT-NeoX-like families of older releases returned a tuple.
        result: Tensor = output[0] if isinstance(output, tuple) else output
        if not bool(result.isfinite().all()):
            raise NumericalError(f"{self.name}: its output holds NaN or infinity; check the weights, or use --dtype float32")
        return result

    def collect(self, statistics: Mapping[str, Statistic], attention_is_final: bool = False) -> None:
        """Run all micro-batches and add the inputs of the named linears to their statistics; the block stays where it is.

        `attention_is_final`: nothing that feeds the attention is edited from here on. Its outputs are kept, (tokens, hidden)
        in all, and no later run computes them again.
        """
        if not statistics:
            return
        with ExitStack() as stack:
            if self.remembered or attention_is_final:
                module = self.module.get_submodule(self.attention)
                attend = _replaying(list(self.remembered)) if self.remembered else _keeping(module.forward, self.remembered)
                stack.enter_context(forward_replaced(module, attend))
            # Experts see only the tokens routed to them, so only a single statistic has seen all once its hook has run.
            self._record(statistics, stack, stop=len(statistics) == 1)
            for hidden in self.hidden:
                with suppress(_SeenEnough):
                    self.run(hidden)
        release_freed_memory()

    def advance(self, statistics: Mapping[str, Statistic] | None = None) -> None:
        """Run all micro-batches for good: the outputs become the next block's inputs. Adds to statistics as `collect` does."""
        with ExitStack() as stack:
            self._record(statistics or {}, stack, stop=False)
            for _ in self.steps():
                pass
        if statistics:
            release_freed_memory()

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run all micro-batches for good; yields (input, output) of each, (batch, length, hidden) both."""
        with ExitStack() as stack:
            if self.remembered:
                module = self.module.get_submodule(self.attention)
                stack.enter_context(forward_replaced(module, _replaying(self.remembered)))
            for index, hidden in enumerate(self.hidden):
                output = self.run(hidden)
                self.hidden[index] = output
                yield hidden, output
        self.advanced = True

    def take_inputs(self, hidden: Sequence[Tensor]) -> None:
        """Read other inputs than the walk's own, one (batch, length, hidden) tensor a micro-batch."""
        self.hidden[:] = hidden

    def hand_over(self, outputs: Sequence[Tensor]) -> None:
        """Give these outputs, of a run that was made elsewhere, to the next block."""
        self.hidden[:] = outputs
        self.advanced = True

    def _record(self, statistics: Mapping[str, Statistic], stack: ExitStack, stop: bool) -> None:
        for name, statistic in statistics.items():
            stack.enter_context(_recorded_inputs(self.linear(name), statistic.add, stop))


class _SeenEnough(Exception):
    """Ends a run of a block whose output nobody needs."""


@contextmanager
def _recorded_inputs(linear: nn.Linear, add: Callable[[Tensor], None], stop: bool) -> Iterator[None]:
    def record(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(args[0].detach().flatten(0, -2))
        if stop:
            raise _SeenEnough

    handle = linear.register_forward_pre_hook(record)
    try:
        yield
    finally:
        handle.remove()


def _keeping(forward: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    def keeping(*args: Any, **kwargs: Any) -> Any:
        kept.append(forward(*args, **kwargs))
        return kept[-1]

    return keeping


def _replaying(kept: list[Any]) -> Callable[..., Any]:
    """Gives what was kept, in order, and frees it."""
    return lambda *args, **kwargs: kept.pop(0)


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module stays in place, with its attributes, but computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
