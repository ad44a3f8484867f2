"""The walk of `prune depth`: copy the blocks that stay, and fold what those of a gap added into the block before it.

Two streams: the original's, which runs through every block up to the last gap, and the pruned model's, which parts from it at
the first one. The block before a gap is read a second time once the original has come to the gap's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from compresskit import distributed
from compresskit.checkpoint.writer import Writer
from compresskit.machine.precision import torch_dtype
from compresskit.models import meta
from compresskit.models.fewer_blocks import kept_blocks, renumbered
from compresskit.models.load import open_model
from compresskit.models.model import Model
from compresskit.pruning.depth.fold import fold, scale_of
from compresskit.pruning.depth.request import DepthRequest, last_writer
from compresskit.walk.block import Block
from compresskit.walk.calls import Calls
from compresskit.walk.hidden_states import copied
from compresskit.walk.sequence import OnBlock, replace_weight
from compresskit.walk.walk import Walk


@dataclass(frozen=True)
class Before:
    """The block before a gap, until the gap's end is reached."""

    index: int
    hidden: list[Any]
    """Its inputs in the pruned model, by micro-batch."""
    calls: Calls


@torch.no_grad()
def remove_blocks(request: DepthRequest, walk: Walk, removed: Sequence[int], writer: Writer, on_block: OnBlock) -> None:
    """Write the model without the blocks; each kept block's facts go to `writer.facts["blocks"]`."""
    work = _Removal(request, walk, removed, writer)
    count = request.model.block_count
    if request.method.refit != "none":
        for block in walk:
            work.visit(block)
            on_block("removing", block.index + 1, count)
            if work.is_done(block.index):
                break
        if work.before:  # the last block goes
            work.end_gap(walk.hidden)
    for index in kept_blocks(request.model, removed):
        work.copy(index, {})
    work.copy_rest()


class _Removal:
    """What the walk carries from block to block."""

    def __init__(self, request: DepthRequest, walk: Walk, removed: Sequence[int], writer: Writer):
        self.request, self.walk, self.removed, self.writer = request, walk, set(removed), writer
        self.new_number = {old: new for new, old in enumerate(kept_blocks(request.model, removed))}
        self.names = renumbered(request.model, removed)
        self.written: Model | None = open_model(writer.partial, request.options.trust_remote_code) if writer.done else None
        self.stream: list[Any] | None = None
        """Hidden states of the pruned model; None as long as they are the original's."""
        self.before: Before | None = None

    def visit(self, block: Block) -> None:
        """Bring the pruned model's stream to this block of the original's walk, and through it if it stays."""
        if block.index in self.removed:
            if block.index == 0:  # no block is before this gap: the streams part at the embedding
                self.stream = copied(block.hidden)
            return
        if self.before:
            self.end_gap(block.hidden)
        if block.index + 1 in self.removed:
            stream = copied(block.hidden) if self.stream is None else self.stream
            self.before = Before(block.index, stream, block.calls)
        elif self.stream is None:
            self.copy(block.index, {})
        elif self.request.method.refit == "all":
            block.advance()
            self._run(replace(block, hidden=self.stream, advanced=False), block.hidden)
        else:
            self._run(replace(block, hidden=self.stream), None)

    def is_done(self, index: int) -> bool:
        """Whether no block after this one is refitted."""
        return self.request.method.refit == "gaps" and index > max(self.removed)

    def end_gap(self, targets: Sequence[torch.Tensor]) -> None:
        """Refit the block before a gap to `targets`, what the original's block after it gets, and run it."""
        assert self.before is not None
        before, self.before = self.before, None
        self.stream = before.hidden
        with self.walk.block(before.index, before.hidden, before.calls) as block:
            self._run(block, targets)

    def _run(self, block: Block, targets: Sequence[torch.Tensor] | None) -> None:
        """Refit a block to what it should give, write it, and bring the pruned model's stream through it."""
        assert self.stream is not None
        name = last_writer(self.request.model, block.index)
        changed = {} if name is None or targets is None else self._refitted(block, name, targets)
        self.copy(block.index, changed)
        for number, hidden in enumerate(block.hidden):
            self.stream[number] = block.run(hidden, number)

    def _refitted(self, block: Block, name: str, targets: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Put the refitted weight into the block, rounded as it is stored; what `copy` is to write and to record."""
        linear, model = block.linear(name), self.request.model
        new = self.new_number[block.index]
        if new in self.writer.done:
            assert self.written is not None
            there = self.written.block_name(new) + name.removeprefix(block.name)
            replace_weight(linear, meta.read_plain(self.written, f"{there}.weight"))
            return {}
        scale = scale_of(block, linear)
        if scale is None:
            return {}
        found = fold(block, linear, scale, targets, self.request.method.ridge)
        stored = found.weight.to(torch_dtype(model.spec_of(f"{name}.weight").dtype))
        replace_weight(linear, stored)
        facts = {
            "refitted": name.removeprefix(block.name + "."),
            "error_before": found.error_before,
            "error_after": found.error_after,
        }
        return {"facts": facts, "weight": (model.stored_name(f"{name}.weight"), meta.to_stored(model, f"{name}.weight", stored))}

    def copy(self, index: int, changed: dict[str, Any]) -> None:
        """Write a kept block under its new number, with a changed weight if there is one, unless it is on disk."""
        new = self.new_number[index]
        if new in self.writer.done:
            return
        prefix = f"{self.request.model.stored_blocks}{new}."
        weight = dict([changed["weight"]]) if changed else {}
        self._copy([name for name in self.names if name.startswith(prefix)], weight)
        self.writer.finish_block(new, {"source_block": index} | changed.get("facts", {}))

    def _copy(self, names: Sequence[str], weight: dict[str, torch.Tensor]) -> None:
        checkpoint = self.request.model.checkpoint
        for name in names:
            old = self.names[name]
            if old in weight:
                self.writer.put(name, weight[old])
            elif distributed.is_first():
                self.writer.put(name, checkpoint.read(old))
            else:
                self.writer.missing.discard(name)

    def copy_rest(self) -> None:
        """Write what lies outside the kept blocks."""
        self._copy([name for name in self.names if name in self.writer.missing], {})
        self.writer.copy_missing(self.request.model.checkpoint)  # nothing is left: it hashes the files that are whole
