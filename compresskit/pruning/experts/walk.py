"""The walk of the methods that remove experts: score, remove, refit and write, block by block.

Two streams: the pruned model's, from which come the scores and the inputs of the refit, and with a refit the original's, from
which come its targets. They part at the first block with experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compresskit.checkpoint.writer import Writer
from compresskit.machine.precision import torch_dtype
from compresskit.models import meta
from compresskit.models.fewer_experts import blocks_with_experts, experts_path, linears_of
from compresskit.models.load import open_model
from compresskit.models.model import Model
from compresskit.pruning.experts.blocks import cut, experts_of, recorded, write_block
from compresskit.pruning.experts.merge import Pruned, improve_router, merge_experts
from compresskit.pruning.experts.method import MergingMethod
from compresskit.pruning.experts.observe import Observed, grouped, observe
from compresskit.pruning.experts.refit import Routed, refit_experts
from compresskit.pruning.experts.request import ExpertsRequest
from compresskit.walk.block import Block
from compresskit.walk.hidden_states import beside, copied
from compresskit.walk.images import add_between
from compresskit.walk.sequence import OnBlock, finish_block
from compresskit.walk.walk import Walk


@torch.no_grad()
def prune_blocks(request: ExpertsRequest, walk: Walk, writer: Writer, on_block: OnBlock) -> None:
    """Write the model with fewer experts; each block's facts go to `writer.facts["blocks"]`."""
    work = _Removal(request, walk, writer)
    for block in walk:
        work.visit(block)
        on_block("removing experts", block.index + 1, walk.model.block_count)
    writer.copy_missing(walk.model.checkpoint)


class _Removal:
    """What the walk carries from block to block."""

    def __init__(self, request: ExpertsRequest, walk: Walk, writer: Writer):
        self.request, self.walk, self.writer = request, walk, writer
        self.with_experts = set(blocks_with_experts(request.model))
        self.result = request.result_model()
        self.network: PreTrainedModel = meta.build(self.result, request.options.trust_remote_code, walk.dtype)
        self.written: Model | None = open_model(writer.partial, request.options.trust_remote_code) if writer.done else None
        self.stream: list[Any] | None = None
        """Inputs of the pruned model's block; None as long as they are the original's, and where the original's are not kept."""

    def visit(self, block: Block) -> None:
        """Prune and write one block of the original's walk, and bring the streams through it."""
        if self.stream is not None:
            add_between(self.stream, block.calls)
        elif self.request.has_targets and block.index in self.with_experts:
            self.stream = copied(block.hidden)
        if block.index in self.with_experts:
            self._advance(block, replace(block, module=self._pruned(block)))
            meta.empty(self.result, self.network, block.name)
        else:
            if block.index not in self.writer.done:
                finish_block(self.request.model, block, self.writer, {})
            self._advance(block, block)

    def _advance(self, block: Block, ours: Block) -> None:
        """Bring the pruned model's stream through `ours`, or the walk's own where that is the pruned model's."""
        if self.stream is None:
            ours.advance()
            block.advanced = True
            return
        for number, hidden in enumerate(self.stream):
            self.stream[number] = ours.run(hidden, number)

    def _pruned(self, block: Block) -> nn.Module:
        """The module of a block with fewer experts, filled, and written unless it is on disk."""
        module: nn.Module = self.network.get_submodule(block.name)
        if block.index in self.writer.done:
            assert self.written is not None
            meta.fill(self.written, self.network, block.name, self.walk.device, self.walk.dtype)
            return module
        model, method = self.request.model, self.request.method
        inputs = block.hidden if self.stream is None else self.stream
        seen = observe(self.request, self.walk, block, inputs)
        targets = self._targets(block) if self.request.has_targets else []
        groups = grouped(self.request, block, seen)
        kept = [group[0] for group in groups]
        cut(block.module, module, experts_path(model, block.index), kept)
        ours = Pruned(replace(block, module=module), experts_of(module, self.result, block.index), inputs, targets)
        facts, edited = self._facts(kept, seen), set[str]()
        if isinstance(method, MergingMethod) and len(kept) < self.request.count:
            edited |= merge_experts(self.request, (block, ours), seen, groups)
            facts["groups"] = groups
            if method.refit_router:
                names = improve_router(self.request, ours, seen, groups)
                facts["router_refitted"] = bool(names)
                edited |= names
        if method.refit:
            refitted = refit_experts(ours.experts, ours.routed(), targets, method.ridge, self._stored_dtype(block.index))
            facts |= {"error_before": refitted.before, "error_after": refitted.after}
            edited |= {f"{each[-1]}.weight" for each in linears_of(self.result, block.index)} if refitted.changed else set()
        write_block((model, self.result), block.index, kept, self._stored(module, block.name, edited), self.writer)
        finish_block(model, block, self.writer, facts)
        return module

    def _targets(self, block: Block) -> list[Tensor]:
        """Outputs of the original's experts on its own stream, which advances."""
        found: list[Routed] = []
        targets = beside(block.hidden)
        with recorded(experts_of(block.module, self.request.model, block.index), found):
            for _ in block.steps():
                targets.append(found.pop().output)
        return targets

    def _stored_dtype(self, index: int) -> torch.dtype:
        last = linears_of(self.request.model, index)[0][-1]
        return torch_dtype(self.request.model.spec_of(f"{last}.weight").dtype)

    def _stored(self, module: nn.Module, block: str, names: set[str]) -> dict[str, Tensor]:
        """Tensors of a pruned block as they are stored, by plain name in the result."""
        found = {}
        for name in sorted(names):
            value = module.get_parameter(name.removeprefix(f"{block}.")).detach()
            found[name] = value.to(torch_dtype(self.result.spec_of(name).dtype))
        return found

    def _facts(self, kept: list[int], observed: Observed) -> dict[str, Any]:
        """What the manifest says of a block."""
        seen = observed.seen
        gone = [expert for expert in range(self.request.count) if expert not in kept]
        facts: dict[str, Any] = {"kept_experts": kept}
        if seen.tokens:
            facts |= {"tokens_by_expert": [int(each) for each in seen.tokens_of], "removed_weight_share": seen.weight_share(gone)}
        return facts
