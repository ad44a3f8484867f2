"""Request of the methods of `prune` that remove experts: checks without weights, planned output and cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compresskit.checkpoint.outputs import Outputs
from compresskit.errors import RequestError
from compresskit.evaluation.request import scoring_bytes
from compresskit.job import HELD_BACK
from compresskit.models import layouts
from compresskit.models.fewer_experts import (
    FEWEST_OF_A_GROUP,
    blocks_with_experts,
    by_expert,
    check_all_known,
    chosen_count,
    configuration,
    experts_count,
    experts_group,
    remaining_tensors,
    router_groups,
    router_linear,
)
from compresskit.models.model import Model
from compresskit.models.shapes import dense_shapes
from compresskit.pruning.experts.method import ExpertsMethod, MergingMethod
from compresskit.pruning.parts import PartsRequest
from compresskit.pruning.request import opened
from compresskit.stages import Options
from compresskit.walk.cost import FLOAT32_BYTES, SUMMED_BYTES, block_bytes, head_share, held_bytes, walk_bytes

PASSES, PASSES_REFIT = 2.0, 4.0
"""The statistics and the pruned model's stream; with a refit also the original's stream, and the experts that stay."""
PASSES_ROUTER = 2.0
"""The merged experts behind the old rows of the router and behind the new ones."""
STREAMS_REFIT = 3
"""Hidden states held beside a walk's own: the pruned model's, the original's output and what runs through the experts."""


@dataclass(frozen=True)
class ExpertsRequest(PartsRequest):
    """A request to remove experts of a model."""

    method: ExpertsMethod
    parts = "experts"

    @cached_property
    def count(self) -> int:
        """Number of experts of a block."""
        return experts_count(self.model)

    @property
    def groups(self) -> int:
        """Number of groups of experts of which the router takes equal sizes for granted."""
        return router_groups(self.model)[0]

    @property
    def kept(self) -> int:
        """Number of experts that stay."""
        return self.method.kept_of(self.count, self.groups)

    @property
    def walks(self) -> bool:
        """Whether anything of the work looks at calibration text."""
        return self.method.needs_statistics or self.method.refit

    @property
    def has_targets(self) -> bool:
        """Whether anything is refitted to what the original's experts give."""
        method = self.method
        return method.refit or (isinstance(method, MergingMethod) and method.refit_router)

    def check(self) -> None:
        """Refuse what cannot lose experts.

        Raises:
            RequestError: the source is in low bits, or too few experts would stay for a token, or for a group of the router.
            UnsupportedArchitecture: there are no experts, or the family's network does not follow their number.
        """
        model = self.model
        self.check_dense()
        self.check_known()
        self._check_count()
        check_all_known(model)
        by_expert(model, self.kept)  # refuses a network that does not follow the number
        if isinstance(self.method, MergingMethod) and self.kept < self.count:
            self._check_merging(self.method)

    def _check_merging(self, method: MergingMethod) -> None:
        """Refuse groups that are too small for all experts, and a router that is no one matrix."""
        size = getattr(method, "group_size", self.count)
        if size * self.kept < self.count:
            raise RequestError(
                f"--group-size {size}: {self.kept} groups of it do not hold {self.count} experts; pass "
                f"--group-size {-(-self.count // self.kept)} or more"
            )
        axes = by_expert(self.model, self.kept)
        for index in blocks_with_experts(self.model):
            router_linear(self.model, axes, index)

    def _check_count(self) -> None:
        count, kept, method = self.count, self.kept, self.method
        chosen, (groups, taken) = chosen_count(self.model), router_groups(self.model)
        flag = f"--sparsity {method.sparsity:g}" if method.experts is None else f"--experts {method.experts}"
        if kept > count:
            raise RequestError(f"{flag}: the model has {count} experts in a block; keep at most as many")
        if kept < chosen:
            raise RequestError(f"{flag}: would keep {kept} of {count} experts, and a token gets {chosen}; keep at least {chosen}")
        if kept == count and method.experts is None and method.sparsity > 0:
            raise RequestError(f"{flag}: is less than half of what can go of {count} experts; pass --experts {count - groups}")
        if kept % groups:
            raise RequestError(
                f"{flag}: would keep {kept} experts, and the router chooses among {groups} groups of equal size; keep a multiple "
                f"of {groups}"
            )
        if groups > 1 and (kept // groups < FEWEST_OF_A_GROUP or taken * (kept // groups) < chosen):
            raise RequestError(
                f"{flag}: would leave {kept // groups} experts in each of {groups} groups, of which a token takes {chosen} from "
                f"{taken} groups; keep more"
            )

    def outputs(self) -> Outputs:
        """The checkpoint's files."""
        model = self.model
        return Outputs(remaining_tensors(model, self.kept), configuration(model, self.kept), files=layouts.own_files(model))

    def result_model(self) -> Model:
        """The model with fewer experts."""
        return dense_shapes(self.model, self.outputs())

    def passes(self) -> float:
        """Forward passes of a window through all blocks: statistics, refit, the judgement on what is held back."""
        each = PASSES_REFIT if self.method.refit else PASSES if self.walks else 0.0
        if isinstance(self.method, MergingMethod) and self.method.refit_router:
            each = PASSES_REFIT + PASSES_ROUTER
        return self.sampling_passes + each * self.options.samples + 2 * HELD_BACK * (1 + head_share(self.model))

    def peak_bytes(self) -> int:
        """Peak bytes: of the walk, or of the judgement."""
        model, length, samples = self.model, self.options.sequence_length, self.options.samples
        group = experts_group(model, blocks_with_experts(model)[0])
        assert group is not None
        solved = block_bytes(model) + (SUMMED_BYTES + FLOAT32_BYTES) * group.width**2
        tokens = samples * length
        streams = STREAMS_REFIT if self.has_targets else 0
        streams += 1 if isinstance(self.method, MergingMethod) else 0  # inputs of the router
        walked = walk_bytes(model, (samples if self.walks else 0, length), solved) + streams * held_bytes(model, tokens)
        return max(walked, scoring_bytes(model, HELD_BACK * length))


def open_request(method: ExpertsMethod, source_name: str, out: Path, options: Options) -> ExpertsRequest:
    """Open and check a request to remove experts; see `opened`."""
    return opened(ExpertsRequest, method, source_name, out, options)
