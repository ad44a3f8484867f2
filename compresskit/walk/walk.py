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
from typing import Any

import torch
from torch import Tensor, nn

from compresskit.machine.device import Where
from compresskit.machine.memory import release_freed_memory
from compresskit.models import meta
from compresskit.models.model import Model
from compresskit.walk.block import Block, Call, Calls, forward_replaced, shape_of
from compresskit.walk.cost import micro_batch_size


class Walk:
    """Iterating gives the blocks in order; `logits` then gives the model's output, micro-batch by micro-batch.

    tokens: (samples, length) int64, without padding; samples may be 0 (no activations are computed then).
    Iterating twice walks twice.
    """

    def __init__(self, model: Model, tokens: Tensor, where: Where, micro_batch: int | None = None):
        """`micro_batch`: samples computed at once, None for `micro_batch_size`."""
        self.model, self.device, self.dtype = model, where.device, where.dtype
        self.finished: Mapping[int, Model] = {}
        self.network = meta.build(model, where.trust_remote_code)
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

    def resumed(self, finished: Mapping[int, Model]) -> Walk:
        """The same walk, in which some blocks are read, as they were edited, from another model."""
        part = copy.copy(self)
        part.hidden, part.finished = [], finished
        return part

    def blocks(self) -> list[nn.Module]:
        """The modules of the decoder blocks, in order."""
        return [self.network.get_submodule(self.model.block_name(i)) for i in range(self.model.block_count)]

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        calls = self._capture()
        for index in range(self.model.block_count):
            block = self._filled(index, self.hidden, calls[index])
            yield block
            if not block.advanced:
                block.advance()
            self.release(block)
            del block
            release_freed_memory()

    def release(self, block: Block) -> None:
        """Free the weights of a block that has been advanced and that nothing will run again."""
        meta.empty(self.model, self.network, block.name)

    @contextmanager
    def block(self, index: int, hidden: list[Tensor], calls: Calls) -> Iterator[Block]:
        """One block out of the order, for these inputs; `calls` are those that the walk gave the block."""
        block = self._filled(index, [each.to(device=self.device, dtype=self.dtype) for each in hidden], calls)
        yield block
        self.release(block)

    def _filled(self, index: int, hidden: list[Tensor], calls: Calls) -> Block:
        """A block with its weights, from the model that holds it as it was edited, or from the walk's own."""
        name = self.model.block_name(index)
        source = self.finished.get(index, self.model)
        if source is not self.model:
            for group in source.ffn_groups(index):
                meta.resize(self.network, source, group)
        meta.fill(source, self.network, name, self.device, self.dtype)
        attention = self.model.architecture.attention.out_projection.rpartition(".")[0]
        return Block(index, name, self.network.get_submodule(name), hidden, calls, attention)

    def _capture(self) -> list[Calls]:
        """Run the model with blocks that only take notes: the first hidden states and every block's arguments."""
        calls: list[Calls] = [{} for _ in range(self.model.block_count)]
        self.hidden.clear()
        meta.fill(self.model, self.network, "", self.device, self.dtype)
        for batch in self.batches:
            with ExitStack() as stack:
                for index, module in enumerate(self.blocks()):
                    stack.enter_context(forward_replaced(module, _note_taker(calls[index], self.hidden if index == 0 else None)))
                self.network.base_model(input_ids=batch.to(self.device), use_cache=False)
        meta.empty(self.model, self.network, "")
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
        meta.fill(self.model, self.network, "", self.device, self.dtype)
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            yield batch, hidden, self._head
        meta.empty(self.model, self.network, "")

    def _head(self, hidden: Tensor) -> Tensor:
        # The blocks are replaced: of the tokens only the shape matters.
        tokens = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with ExitStack() as stack:
            for index, module in enumerate(self.blocks()):
                stack.enter_context(forward_replaced(module, (lambda *args, **kwargs: hidden) if index == 0 else _identity))
            logits: Tensor = self.network(input_ids=tokens, use_cache=False).logits
        return logits


def _note_taker(calls: Calls, inputs: list[Tensor] | None) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.setdefault(shape_of(hidden_states), Call(args, kwargs))
        if inputs is not None:
            inputs.append(hidden_states)
        return hidden_states

    return forward


def _identity(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
