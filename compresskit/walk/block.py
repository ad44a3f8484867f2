"""One decoder block in memory: its weights, its inputs, its call arguments and hooks on its linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compresskit import distributed
from compresskit.errors import NumericalError
from compresskit.machine.memory import release_freed_memory
from compresskit.walk.calls import Calls
from compresskit.walk.hooks import SeenEnough, forward_replaced, keeping, recorded_inputs, replaying
from compresskit.walk.kept import Kept


class Statistic(Protocol):
    """Sum over tokens that `Block.collect` fills."""

    def add(self, x: Tensor) -> None:
        """Add the linear's inputs for one micro-batch, x (tokens, in)."""

    def share(self) -> None:
        """Make it the statistic of all ranks' micro-batches."""


@dataclass
class Block:
    """One decoder block with plain weights in memory."""

    index: int
    name: str
    module: nn.Module
    hidden: list[Tensor]
    """The block's inputs, one (batch, length, hidden) tensor per micro-batch of this rank."""
    calls: Calls
    attention: str
    """Path inside the block of the module that mixes tokens (the attention), whose output can be kept; "" if there is none."""
    mixer_positions: int = 2
    """Number of leading positions of `Model.linear_sequence` after which that module's output is final."""
    micro_batches: int = 0
    """Number of micro-batches of all ranks together."""
    exchanged: bool = False
    """Whether every rank holds all micro-batches, runs its own and gets the outputs of the others."""
    remembered: list[Any] = field(default_factory=list)
    """Attention outputs, one per micro-batch, if `collect` was asked to keep them."""
    kept: Kept | None = None
    """What the next run need not compute, if `collect` was told which linear alone changes before it."""
    advanced: bool = field(default=False)

    def linear(self, name: str) -> nn.Linear:
        """Return the linear with this plain, model-wide name."""
        found = self.module.get_submodule(name.removeprefix(self.name + "."))
        assert isinstance(found, nn.Linear)
        return found

    @property
    def runs(self) -> bool:
        """Whether text runs through the block; cross-attention to images does not run without them."""
        return bool(self.calls) or not self.hidden

    @property
    def own(self) -> range:
        """Numbers of the micro-batches that this rank runs, among those in `hidden`."""
        return distributed.own(len(self.hidden)) if self.exchanged else range(len(self.hidden))

    def run(self, hidden: Tensor, number: int) -> Tensor:
        """Run the block with the arguments of micro-batch `number`.

        Returns:
            The block's output, in the shape of `hidden`.

        Raises:
            NumericalError: the output is not finite.
        """
        if not self.runs:
            return hidden
        call = self.calls[number]
        return self._checked(self.module(hidden, *call.args, **call.kwargs))

    def run_all(self, stream: Sequence[Tensor]) -> list[Tensor]:
        """Run a stream of hidden states, one tensor per micro-batch of the walk."""
        own = self.own
        outputs = [self.run(each, number) if number in own else torch.empty_like(each) for number, each in enumerate(stream)]
        if self.exchanged:
            distributed.send_each(outputs)
        return outputs

    def run_with(self, hidden: Tensor, number: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Like `run`, with other weights, keyed by their names inside the block; gradients flow to them."""
        call = self.calls[number]
        return self._checked(torch.func.functional_call(self.module, dict(weights), (hidden, *call.args), call.kwargs))

    def _checked(self, output: Any) -> Tensor:
        # Blocks return a tensor, but in older releases GPT-NeoX-like families returned a tuple.
        result: Tensor = output[0] if isinstance(output, tuple) else output
        if not bool(result.isfinite().all()):
            raise NumericalError(f"{self.name}: its output holds NaN or infinity; check the weights, or use --dtype float32")
        return result

    def collect(
        self,
        statistics: Mapping[str, Statistic],
        attention_is_final: bool = False,
        only_it_changes: bool = False,
        comparing: bool = False,
    ) -> None:
        """Run all micro-batches and add the inputs of the named linears to their statistics, without advancing the block.

        `attention_is_final` means that nothing feeding the attention is edited from here on. The attention outputs, (tokens,
        hidden) in all, are then kept and not computed again. `only_it_changes`: of the block's weights only those of the one
        named linear change before the next run, or, if the next run is `comparing`, others that leave its inputs as they are.
        They are then kept (kept.py).
        """
        if not statistics:
            return
        # Experts see only the tokens routed to them, so a run can stop early only when it fills a single statistic.
        stop = len(statistics) == 1
        kept = self._to_keep(next(iter(statistics))) if only_it_changes and stop else None
        runs = [(number, self.hidden[number]) for number in self.own]
        with ExitStack() as stack:
            self._skip(stack, attention_is_final)
            if kept:
                kept.compared = comparing
                stack.enter_context(kept.filling())
            if kept and runs and not comparing:
                with ExitStack() as first, suppress(SeenEnough):
                    self._record(statistics, first, stop=False)
                    first.enter_context(kept.watching())
                    number, hidden = runs.pop(0)
                    self.run(hidden, number)
            self._record(statistics, stack, stop)
            for number, hidden in runs:
                with suppress(SeenEnough):
                    self.run(hidden, number)
        self.kept = kept
        for statistic in statistics.values():
            statistic.share()
        release_freed_memory()

    def _to_keep(self, name: str) -> Kept | None:
        """The attention or the linear's parent, whichever ends with this linear; None if that is the block itself."""
        inner = name.removeprefix(self.name + ".")
        path = self.attention if inner.startswith(self.attention + ".") else inner.rpartition(".")[0]
        return Kept(self.module.get_submodule(path), self.linear(name)) if path else None

    def _skip(self, stack: ExitStack, attention_is_final: bool = False, for_good: bool = False) -> None:
        """Do not compute again what is kept; `for_good` frees what is remembered."""
        if self.kept:
            stack.enter_context(forward_replaced(self.kept.module, self.kept.instead_of(self.kept.module.forward)))
        if self.remembered or (attention_is_final and self.attention):
            module = self.module.get_submodule(self.attention)
            outputs = self.remembered if for_good else list(self.remembered)
            attend = replaying(outputs) if outputs else keeping(module.forward, self.remembered)
            stack.enter_context(forward_replaced(module, attend))

    def advance(self, statistics: Mapping[str, Statistic] | None = None) -> None:
        """Run all micro-batches; the outputs become the next block's inputs. Fills `statistics` like `collect`."""
        with ExitStack() as stack:
            self._record(statistics or {}, stack, stop=False)
            for _ in self.steps():
                pass
        for statistic in (statistics or {}).values():
            statistic.share()
        if statistics:
            release_freed_memory()

    def steps(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run all micro-batches and advance; yields the (input, output) of each, both (batch, length, hidden)."""
        with ExitStack() as stack:
            self._skip(stack, for_good=True)
            own = self.own
            for index, hidden in enumerate(self.hidden):
                output = self.run(hidden, index) if index in own else torch.empty_like(hidden)
                self.hidden[index] = output
                if index in own:
                    yield hidden, output
        if self.exchanged:
            distributed.send_each(self.hidden)
        self.advanced = True

    def take_inputs(self, hidden: Sequence[Tensor]) -> None:
        """Replace the walk's inputs with one (batch, length, hidden) tensor per micro-batch."""
        self.hidden[:] = hidden

    def hand_over(self, outputs: Sequence[Tensor]) -> None:
        """Pass outputs computed elsewhere to the next block."""
        self.hidden[:] = outputs
        self.advanced = True

    def _record(self, statistics: Mapping[str, Statistic], stack: ExitStack, stop: bool) -> None:
        for name, statistic in statistics.items():
            stack.enter_context(recorded_inputs(self.linear(name), statistic.add, stop))
