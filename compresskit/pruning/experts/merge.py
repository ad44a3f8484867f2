"""Merge the experts of a block by groups, and refit the router's rows where that lowers the block's error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from compresskit.machine.precision import torch_dtype
from compresskit.models.experts import PlainExperts
from compresskit.models.fewer_experts import LEAVES, by_expert, experts_group, linears_of, router_linear
from compresskit.models.model import Model
from compresskit.pruning.experts.alignment import Layout, assigned, merged, neurons, put_neurons
from compresskit.pruning.experts.blocks import experts_of, recorded
from compresskit.pruning.experts.evidence import Router, compare_activations
from compresskit.pruning.experts.method import MergingMethod
from compresskit.pruning.experts.observe import Observed
from compresskit.pruning.experts.refit import Routed, energy, missing
from compresskit.pruning.experts.request import ExpertsRequest
from compresskit.pruning.experts.router import refit_router
from compresskit.walk.block import Block
from compresskit.walk.hidden_states import beside


@dataclass(frozen=True)
class Pruned:
    """A block with fewer experts, and what runs through it."""

    block: Block
    experts: PlainExperts
    inputs: Sequence[Any]
    """The pruned model's stream, by micro-batch of this rank."""
    targets: Sequence[Tensor]
    """Outputs of the original's experts, if anything is refitted."""

    def routed(self) -> list[Routed]:
        """Run the block on its inputs."""
        found: list[Routed] = []
        kept = beside(self.block.hidden)
        with recorded(self.experts, found):
            for number, hidden in enumerate(self.inputs):
                self.block.run(hidden, number)
                kept.append(tuple(found.pop()))
        return [Routed(*each) for each in kept]

    def error(self) -> float:
        """Squared error of the experts' outputs, over all ranks."""
        return energy(missing(self.routed(), self.targets))


def merge_experts(
    request: ExpertsRequest, blocks: tuple[Block, Pruned], observed: Observed, groups: Sequence[Sequence[int]]
) -> set[str]:
    """Put the aligned mean of each group into the block with fewer experts, rounded as it is stored.

    `blocks`: the original's and the one that is filled.

    Returns:
        Plain names, in the result, of the tensors that are new.
    """
    method, model = request.method, request.model
    assert isinstance(method, MergingMethod)
    before, after = blocks
    weights = method.weights(observed.seen).tolist()
    changed = set()
    for number, members in enumerate(groups):
        if len(members) == 1:
            continue
        olds = [_linears(before.module, model, before.index, expert) for expert in members]
        new = _linears(after.block.module, model, before.index, number)
        rows = _aligned(method, model, before, members, observed.compared)
        shares = [weights[expert] for expert in members]
        names = linears_of(model, before.index)[number]
        stored = torch_dtype(model.spec_of(f"{names[-1]}.weight").dtype)
        put_neurons(new, _layout(model, before.index), merged(rows, shares).to(stored))
        if new[-1].bias is not None:
            bias = merged([linears[-1].bias.detach() for linears in olds], shares).to(stored).to(new[-1].bias)
            new[-1].bias = nn.Parameter(bias, requires_grad=False)
        changed |= {f"{name}.{leaf}" for name in names for leaf in LEAVES if model.has(f"{name}.{leaf}")}
    return changed


def _aligned(
    method: MergingMethod, model: Model, block: Block, members: Sequence[int], compared: Sequence[Tensor]
) -> list[Tensor]:
    """The neurons of a group's experts, (width, parts) each, in the order of the first one's."""
    layout, experts = _layout(model, block.index), experts_of(block.module, model, block.index)
    core, *others = (neurons(_linears(block.module, model, block.index, expert), layout) for expert in members)
    found = [core]
    for expert, rows in zip(members[1:], others, strict=True):
        activations = compare_activations(experts, members[0], expert, compared) if method.needs_outputs else None
        found.append(rows[assigned(method.likeness(core, rows, activations))])
    return found


def _layout(model: Model, index: int) -> Layout:
    group = experts_group(model, index)
    assert group is not None
    return Layout(group.fused, group.interleaved)


def _linears(module: nn.Module, model: Model, index: int, expert: int) -> list[nn.Linear]:
    """The linears of an expert inside a block's module, its output projection last."""
    prefix = model.block_name(index) + "."
    found = [module.get_submodule(name.removeprefix(prefix)) for name in linears_of(model, index)[expert]]
    return [each for each in found if isinstance(each, nn.Linear)]


def improve_router(request: ExpertsRequest, ours: Pruned, observed: Observed, groups: Sequence[Sequence[int]]) -> set[str]:
    """Refit the router's rows, if it is a softmax's and the error on the calibration text falls.

    Returns:
        Plain names of the tensors that are new; none if the old rows stay.
    """
    if not observed.softmax or all(len(group) == 1 for group in groups):
        return set()
    assert observed.router is not None
    model, index = request.model, ours.block.index
    path = router_linear(model, by_expert(model, request.kept), index)
    module: Any = ours.block.module.get_submodule(path)
    old = Router(module.weight, module.bias if observed.router.bias is not None else None)
    before = ours.error()
    new = refit_router(observed.router, observed.router_inputs, groups, request.method.ridge)
    names = [leaf for leaf, value in zip(LEAVES, new, strict=True) if value is not None]
    for leaf in names:
        name = f"{model.block_name(index)}.{path}.{leaf}"
        stored = torch_dtype(model.spec_of(name).dtype)
        value = getattr(new, leaf).to(stored).to(getattr(old, leaf))
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    if ours.error() < before:
        return {f"{model.block_name(index)}.{path}.{leaf}" for leaf in names}
    for leaf in names:
        setattr(module, leaf, getattr(old, leaf))
    return set()
