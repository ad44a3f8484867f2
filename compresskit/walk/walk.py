"""Walk through a model's blocks in order, one in memory at a time; each block gets its edited predecessor's output.

    for block in walk(model, tokens):
        gram = block.collect({name: Gram(width)})
        ... edit block.module ...

The first hidden states and EACH block's own arguments are captured once, because families with alternating attention give
their blocks different masks. A block is read when the walk reaches it and may be edited. It then runs with its edited
weights, and its output feeds the next block, which is fetched meanwhile (ahead.py). Memory: one block, the hidden states of
all tokens, one micro-batch of activations.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compresskit import distributed
from compresskit.machine.device import Where
from compresskit.machine.memory import release_freed_memory
from compresskit.models import meta
from compresskit.models.model import Model
from compresskit.walk.ahead import Ahead
from compresskit.walk.block import Block
from compresskit.walk.calls import Calls, note_taker, passing_on
from compresskit.walk.cost import lie_on_disk, micro_batch_size
from compresskit.walk.hidden_states import tensors_in
from compresskit.walk.hooks import forward_replaced
from compresskit.walk.images import Images, add_between, check_runs, image_note_taker, inputs_of


class Walk:
    """Iterates over the blocks in order; `logits` then gives the model's output, micro-batch by micro-batch.

    tokens: (samples, length) int64, without padding. With 0 samples no activations are computed.
    Each iteration is a new walk.
    """

    def __init__(
        self,
        model: Model,
        tokens: Tensor,
        where: Where,
        micro_batch: int | None = None,
        images: Images | None = None,
        dealt: bool = True,
    ):
        """`micro_batch`: samples computed at once, None for `micro_batch_size`; one with `images`, those of the windows.

        `dealt`: each rank walks with its own micro-batches; else every rank with all of them.
        """
        self.model, self.device, self.dtype = model, where.device, where.dtype
        self.finished: Mapping[int, Model] = {}
        self.network = meta.build(model, where.trust_remote_code, where.dtype)
        self.images, size = images or {}, 1 if images else micro_batch or micro_batch_size(model, tokens.shape[1])
        self.all_batches = list(torch.split(tokens, size)) if len(tokens) else []
        """Micro-batches of all ranks together."""
        self.dealt, self.exchanged, self.scratch = dealt, False, where.scratch
        self.hidden: list[Tensor] = []
        self.attention: list[Any] = []

    def take(self, samples: int) -> Walk:
        """Return the walk over the first micro-batches that hold at least `samples` samples, or over all if there are fewer."""
        part = copy.copy(self)
        part.hidden = []
        counts = itertools.accumulate((len(batch) for batch in self.all_batches), initial=0)
        part.all_batches = [batch for batch, before in zip(self.all_batches, counts, strict=False) if before < samples]
        return part

    @property
    def batches(self) -> list[Tensor]:
        """The micro-batches of this rank, (samples, length) int64 each."""
        return [self.all_batches[number] for number in self.numbers]

    @property
    def numbers(self) -> range:
        """Their numbers among all."""
        return distributed.own(len(self.all_batches)) if self.dealt else range(len(self.all_batches))

    def held_by_all(self) -> Walk:
        """Return the walk in which every rank holds all micro-batches, runs its own and gets the outputs of the others."""
        part = copy.copy(self)
        part.hidden, part.dealt, part.exchanged = [], False, True
        return part

    def resumed(self, finished: Mapping[int, Model]) -> Walk:
        """Return the walk with some blocks read, as edited, from other models."""
        part = copy.copy(self)
        part.hidden, part.finished = [], finished
        return part

    def blocks(self) -> list[nn.Module]:
        """The decoder block modules, in order."""
        return [self.network.get_submodule(self.model.block_name(i)) for i in range(self.model.block_count)]

    @torch.no_grad()
    def __iter__(self) -> Iterator[Block]:
        with Ahead(self.network, self.device, self.dtype) as ahead:
            ahead.begin(self._source(0), 0)
            calls = self.capture()
            for index in range(self.model.block_count):
                add_between(self.hidden, calls[index])
                block = self.filled(index, self.hidden, calls[index], ahead.take())
                if index + 1 < self.model.block_count:
                    ahead.begin(self._source(index + 1), index + 1)
                yield block
                if not block.advanced:
                    block.advance()
                self.release(block)
                del block
                release_freed_memory()

    def release(self, block: Block) -> None:
        """Free the weights of an advanced block that will not run again."""
        meta.empty(self.model, self.network, block.name)

    @contextmanager
    def block(self, index: int, hidden: list[Tensor], calls: Calls) -> Iterator[Block]:
        """Load one block out of order for these inputs; `calls` are the arguments that the walk gave the block."""
        block = self.filled(index, [each.to(device=self.device, dtype=self.dtype) for each in hidden], calls)
        yield block
        self.release(block)

    def _source(self, index: int) -> Model:
        """The model that holds a block's edited version, or the walk's own."""
        return self.finished.get(index, self.model)

    def filled(self, index: int, hidden: list[Tensor], calls: Calls, known: Mapping[str, Tensor] | None = None) -> Block:
        """Load a block's weights but for those that are `known`."""
        name, source = self.model.block_name(index), self._source(index)
        if source is not self.model:
            for group in source.ffn_groups(index):
                meta.resize(self.network, source, group)
        meta.place(self.network, known or {})
        meta.fill(source, self.network, name, self.device, self.dtype)
        mixer, positions = self.model.architecture.block(index).mixer, self.model.mixer_positions(index)
        self.attention.clear()
        module, count = self.network.get_submodule(name), len(self.all_batches)
        return Block(index, name, module, hidden, calls, mixer, positions, count, self.exchanged, self.attention)

    def capture(self) -> list[Calls]:
        """Run the model with recording blocks to capture the first hidden states and every block's arguments."""
        calls: list[Calls] = [[] for _ in range(self.model.block_count)]
        tokens = sum(batch.numel() for batch in self.batches)
        scratch = self.scratch if self.device.type == "cpu" and lie_on_disk(self.model, tokens) else None
        self.hidden, self.attention = tensors_in(scratch), tensors_in(scratch)
        meta.fill(self.model, self.network, "", self.device, self.dtype, bool(self.images))
        for batch in self.batches:
            seen = inputs_of(self.images, batch, self.network, self.device, self.dtype)
            noted = image_note_taker if seen else note_taker
            with ExitStack() as stack:
                for index, module in enumerate(self.blocks()):
                    note = noted(calls[index], self.hidden if index == 0 else None, self._returned(index))
                    stack.enter_context(forward_replaced(module, note))
                self.network.base_model(input_ids=batch.to(self.device), use_cache=False, **seen)
        check_runs(self.model, calls, len(self.batches) if self.images else 0)
        meta.empty(self.model, self.network, "")
        return calls

    def _returned(self, index: int) -> Callable[[Tensor], Any]:
        """How block `index` returns its hidden states."""
        length = self.model.architecture.block(index).tuple_length
        return (lambda hidden: (hidden, *(None,) * (length - 1))) if length else (lambda hidden: hidden)

    @torch.no_grad()
    def logits(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Give the model's output after the walk, micro-batch by micro-batch.

        Yields:
            (tokens (batch, length) int64, last hidden states (batch, length, hidden), logits (batch, length, vocabulary)
            float32).
        """
        for batch, hidden, head in self.heads():
            logits = head(hidden).float()
            yield batch, hidden, logits
            del logits

    def heads(self) -> Iterator[tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
        """Like `logits`, but the caller computes the logits, for all hidden states or only some.

        Yields:
            (tokens (batch, length) int64, last hidden states (batch, length, hidden), the function that maps hidden states (b, l,
            hidden) to logits (b, l, vocabulary), for any b and l).
        """
        meta.fill(self.model, self.network, "", self.device, self.dtype)
        for batch, hidden in zip(self.batches, self.hidden, strict=True):
            yield batch, hidden, self.head
        meta.empty(self.model, self.network, "")

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (b, l, vocabulary) of hidden states (b, l, hidden). Blocks are replaced: of tokens only the shape matters."""
        tokens = torch.zeros(hidden.shape[-3:-1], dtype=torch.int64, device=self.device)
        with ExitStack() as stack:
            for index, module in enumerate(self.blocks()):
                passing = passing_on(hidden if index == 0 else None, self._returned(index))
                stack.enter_context(forward_replaced(module, passing))
            logits: Tensor = self.network(input_ids=tokens, use_cache=False).logits
        return logits


def windows_of(hidden: Tensor) -> Tensor:
    """Hidden states (windows, length, hidden) of a micro-batch; of a model with several residual streams the first one."""
    return hidden[0] if hidden.ndim > 3 else hidden
