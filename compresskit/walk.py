"""The walk: blocks of a model in order, one in memory at a time, each fed by what its predecessors now are.

    for block in walk(model, tokens):
        gram = block.collect({name: Gram(width)})
        ... edit block.module ...

The first hidden states and EACH block's own arguments are captured once (families whose attention alternates give
their blocks different masks); a block is read when the walk reaches it, may be edited, is run as it then is, and its
output feeds the next one. Memory: one block, the hidden states of all tokens, one micro-batch of activations.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compresskit import skeleton
from compresskit.errors import NumericalError
from compresskit.memory import release_freed_memory
from compresskit.model import Model

MICRO_BATCH_BYTES = 1 << 25
"""Bound on the activations of the widest linear in one micro-batch (32 MiB)."""
CPU_BYTES_PER_NUMBER = 4


class Statistic(Protocol):
    """What `Block.collect` fills: a sum over tokens."""

    def add(self, x: Tensor) -> None:
        """Add the inputs of the linear in one micro-batch, x (tokens, in)."""


@dataclass
class Call:
    """The arguments, besides the hidden states, with which the model calls one block."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Block:
    """One decoder block with its weights in memory, in plain form."""

    index: int
    name: str
    module: nn.Module
    hidden: list[Tensor]
    """The block's inputs, one (batch, length, hidden) tensor a micro-batch."""
    calls: dict[int, Call]
    """The block's arguments by the size of the micro-batch."""
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
        call = self.calls[hidden.shape[0]]
        return self._checked(self.module(hidden, *call.args, **call.kwargs))

    def run_with(self, hidden: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The same with other weights, by their names inside the block; gradients flow to them."""
        call = self.calls[hidden.shape[0]]
        return self._checked(torch.func.functional_call(self.module, dict(weights), (hidden, *call.args), call.kwargs))

    def _checked(self, output: Any) -> Tensor:
        # Blocks return the tensor itself, but GPT-NeoX-like families of older releases returned a tuple.
        result: Tensor = output[0] if isinstance(output, tuple) else output
        if not bool(result.isfinite().all()):
            raise NumericalError(f"{self.name}: its output holds NaN or infinity; check the weights, or use --dtype float32")
        return result

    def collect(
        self, statistics: Mapping[str, Statistic], advance: bool = False, keep_attention: bool = False, stop: bool = False
    ) -> None:
        """Run all micro-batches and add the inputs of the named linears to their statistics.

        With `advance` the outputs are kept as the next block's inputs: right when the block is not edited after.
        With `keep_attention` the attention's outputs are kept, (tokens, hidden) in all, and no later run of the block
        computes them again: right when only what does not feed the attention is edited after.
        With `stop` a run ends once the first of the linears has its input: right when that is all that is wanted.
        """
        with ExitStack() as stack:
            if self.remembered or keep_attention:
                module = self.module.get_submodule(self.attention)
                attend = _replaying(list(self.remembered)) if self.remembered else _keeping(module.forward, self.remembered)
                stack.enter_context(_forward_replaced(module, attend))
            for name, statistic in statistics.items():
                stack.enter_context(_recorded_inputs(self.linear(name), statistic.add, stop))
            for index, hidden in enumerate(self.hidden):
                try:
                    output = self.run(hidden)
                except _SeenEnough:
                    continue
                if advance:
                    self.hidden[index] = output
        self.advanced = advance
        release_freed_memory()

    def advance(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run all micro-batches for good; yields (input, output) of each, (batch, length, hidden) both."""
        with ExitStack() as stack:
            if self.remembered:
                module = self.module.get_submodule(self.attention)
                stack.enter_context(_forward_replaced(module, _replaying(self.remembered)))
            for index, hidden in enumerate(self.hidden):
                output = self.run(hidden)
                self.hidden[index] = output
                yield hidden, output
        self.advanced = True


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


def micro_batch_size(model: Model, length: int) -> int:
    """Samples of `length` tokens whose activations in the widest linear stay below `MICRO_BATCH_BYTES`; at least one."""
    widest = max(group.width for i in range(model.block_count) for group in model.ffn_groups(i))
    bytes_per_sample = length * max(widest, model.hidden_size) * CPU_BYTES_PER_NUMBER
    return max(1, MICRO_BATCH_BYTES // bytes_per_sample)


class Walk:
    """Iterating gives the blocks in order; `logits` then gives the model's output, micro-batch by micro-batch.

    tokens: (samples, length) int64, without padding; samples may be 0 (no activations are computed then).
    Iterating twice walks twice.
    """

    def __init__(  # noqa: PLR0913, PLR0917 (the last two have defaults that most callers keep)
        self,
        model: Model,
        tokens: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        trust_remote_code: bool = False,
        source_of: Callable[[int], Model | None] = lambda index: None,
        micro_batch: int | None = None,
    ):
        """`source_of(i)` may name another model (already edited, on disk) to read block i from.

        `micro_batch`: samples computed at once, None for `micro_batch_size`.
        """
        self.model, self.device, self.dtype = model, device, dtype
        self.source_of = source_of
        self.network = skeleton.build(model, trust_remote_code)
        size = micro_batch or micro_batch_size(model, tokens.shape[1])
        self.batches = list(torch.split(tokens, size)) if len(tokens) else []
        self.hidden: list[Tensor] = []

    def take(self, samples: int) -> Walk:
        """The same walk over whole micro-batches of the first samples: at least `samples`, fewer where there are fewer."""
        part = copy.copy(self)
        part.hidden = []
        counts = itertools.accumulate((len(batch) for batch in self.batches), initial=0)
        part.batches = [batch for batch, before in zip(self.batches, counts, strict=False) if before < samples]
        return part

    def blocks(self) -> list[nn.Module]:
        """The modules of the decoder blocks, in order."""
        return [self.network.get_submodule(self.model.block_name(i)) for i in range(self.model.block_count)]

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        calls = self._capture()
        for index in range(self.model.block_count):
            name = self.model.block_name(index)
            self._fill_block(index, name)
            attention = self.model.architecture.attention.out_projection.rpartition(".")[0]
            block = Block(index, name, self.network.get_submodule(name), self.hidden, calls[index], attention)
            yield block
            if not block.advanced:
                for _ in block.advance():
                    pass
            skeleton.empty(self.model, self.network, name)
            del block
            release_freed_memory()

    @contextmanager
    def block(self, index: int, hidden: list[Tensor], calls: dict[int, Call]) -> Iterator[Block]:
        """One block out of the order, for these inputs; `calls` are those that the walk gave the block."""
        name = self.model.block_name(index)
        self._fill_block(index, name)
        attention = self.model.architecture.attention.out_projection.rpartition(".")[0]
        given = [each.to(device=self.device, dtype=self.dtype) for each in hidden]
        yield Block(index, name, self.network.get_submodule(name), given, calls, attention)
        skeleton.empty(self.model, self.network, name)

    def _fill_block(self, index: int, name: str) -> None:
        source = self.source_of(index) or self.model
        if source is not self.model:
            for group in source.ffn_groups(index):
                skeleton.resize(self.network, source, group)
        skeleton.fill(source, self.network, name, self.device, self.dtype)

    def _capture(self) -> list[dict[int, Call]]:
        """Run the model with blocks that only take notes: the first hidden states and every block's arguments."""
        calls: list[dict[int, Call]] = [{} for _ in range(self.model.block_count)]
        self.hidden.clear()
        skeleton.fill(self.model, self.network, "", self.device, self.dtype)
        for batch in self.batches:
            with ExitStack() as stack:
                for index, module in enumerate(self.blocks()):
                    stack.enter_context(_forward_replaced(module, _note_taker(calls[index], self.hidden if index == 0 else None)))
                self.network.base_model(input_ids=batch.to(self.device), use_cache=False)
        skeleton.empty(self.model, self.network, "")
        return calls

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """After the walk: what the model says, micro-batch by micro-batch.

        Yields:
            (tokens (batch, length) int64, last hidden states (batch, length, hidden), logits (batch, length, vocabulary)
            float32).
        """
        for batch, hidden, head in self.heads():
            logits = head(hidden).float()
            yield batch, hidden, logits
            del logits

    def heads(self) -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
        """After the walk: as `logits`, which the caller makes, of all hidden states or only of some.

        Yields:
            (tokens (batch, length) int64, last hidden states (batch, length, hidden), the function that makes logits (b, l,
            vocabulary) of hidden states (b, l, hidden), whatever b and l).
        """
        skeleton.fill(self.model, self.network, "", self.device, self.dtype)
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            yield batch, hidden, self._head
        skeleton.empty(self.model, self.network, "")

    def _head(self, hidden: Tensor) -> Tensor:
        # The blocks are replaced: of the tokens only the shape matters.
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with ExitStack() as stack:
            for index, module in enumerate(self.blocks()):
                stack.enter_context(_forward_replaced(module, (lambda *args, **kwargs: hidden) if index == 0 else _identity))
            logits: Tensor = self.network(input_ids=tokens, use_cache=False).logits
        return logits


def _note_taker(calls: dict[int, Call], inputs: list[Tensor] | None) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.setdefault(hidden_states.shape[0], Call(args, kwargs))
        if inputs is not None:
            inputs.append(hidden_states)
        return hidden_states

    return forward


def _keeping(forward: Callable[..., Any], kept: list[Any]) -> Callable[..., Any]:
    def keeping(*args: Any, **kwargs: Any) -> Any:
        kept.append(forward(*args, **kwargs))
        return kept[-1]

    return keeping


def _replaying(kept: list[Any]) -> Callable[..., Any]:
    """Gives what was kept, in order, and frees it."""
    return lambda *args, **kwargs: kept.pop(0)


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module stays in place, with its attributes, but computes something else."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
