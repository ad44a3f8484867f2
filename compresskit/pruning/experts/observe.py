"""Run the original's experts of a block on calibration text: scores, what methods that merge compare, and the groups."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from compresskit import distributed
from compresskit.models.fewer_experts import by_expert, router_linear
from compresskit.pruning.experts.blocks import experts_of, recorded
from compresskit.pruning.experts.evidence import COMPARED_WINDOWS, Evidence, Router, collect, compare_outputs
from compresskit.pruning.experts.grouping import best
from compresskit.pruning.experts.method import MergingMethod
from compresskit.pruning.experts.refit import Routed
from compresskit.pruning.experts.request import ExpertsRequest
from compresskit.pruning.experts.router import is_softmax
from compresskit.pruning.experts.scores import ExpertStatistics, watched
from compresskit.walk.block import Block
from compresskit.walk.hidden_states import beside
from compresskit.walk.hooks import recorded_inputs
from compresskit.walk.walk import Walk


@dataclass
class Observed:
    """What one run of a block showed."""

    seen: ExpertStatistics
    router: Router | None = None
    """Of the original; for methods that merge, as all that follows."""
    router_inputs: list[Any] = field(default_factory=list)
    """By micro-batch of this rank, (tokens, hidden)."""
    compared: list[Any] = field(default_factory=list)
    """Inputs of the experts in the first micro-batches, of those this rank's."""
    softmax: bool = True
    """Whether the router's weights are in the proportion of a softmax, on every rank."""


def observe(request: ExpertsRequest, walk: Walk, block: Block, inputs: Sequence[Any]) -> Observed:
    """Run the original's block on the pruned model's stream; sums are of all ranks."""
    experts = experts_of(block.module, request.model, block.index)
    found = Observed(ExpertStatistics(experts.count, walk.device))
    if not request.method.needs_statistics:
        return found
    method = request.method if isinstance(request.method, MergingMethod) and request.kept < request.count else None
    routed: list[Routed] = []
    first = len(walk.take(COMPARED_WINDOWS).all_batches) if method and method.needs_outputs else 0
    with ExitStack() as stack:
        stack.enter_context(watched(experts, found.seen))
        if method:
            found.router_inputs, found.compared = beside(block.hidden), beside(block.hidden)
            path = router_linear(request.model, by_expert(request.model, request.kept), block.index)
            router = block.module.get_submodule(path)
            found.router = _router(router)
            stack.enter_context(recorded_inputs(router, found.router_inputs.append, stop=False))
            stack.enter_context(recorded(experts, routed))
        for number, hidden in enumerate(inputs):
            block.run(hidden, number)
            if method:
                each = routed.pop()
                assert found.router is not None
                if number == 0:
                    found.softmax = is_softmax(found.router, found.router_inputs[0], each)
                if walk.numbers[number] < first:
                    found.compared.append(each.hidden)
    found.seen.share()
    found.softmax = all(distributed.every(found.softmax))
    return found


def _router(module: nn.Module) -> Router:
    bias = getattr(module, "bias", None)
    weight = module.get_parameter("weight").detach().float()
    return Router(weight, bias.detach().float() if isinstance(bias, Tensor) else None)


def grouped(request: ExpertsRequest, block: Block, found: Observed) -> list[list[int]]:
    """The groups of experts, the one that stays first, in the order of these; of one expert each where nothing is merged."""
    method, experts = request.method, experts_of(block.module, request.model, block.index)
    scores = method.scores(found.seen, block.index).tolist()
    cores = best(scores, request.kept, request.groups)
    if not isinstance(method, MergingMethod) or len(cores) == len(scores):
        return [[core] for core in cores]
    assert found.router is not None
    outputs = None
    if method.needs_outputs:  # the first of this rank's micro-batches alone
        batches = list(zip(found.router_inputs, found.compared, strict=False))
        outputs = compare_outputs(experts, found.router, batches)
    evidence = Evidence(collect(found.router, found.router_inputs), outputs)
    return method.groups_of(scores, method.similarity(evidence).tolist(), cores)
