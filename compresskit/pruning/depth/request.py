"""Request of `prune depth`: checks without weights, planned output and cost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from compresskit.checkpoint.outputs import Outputs
from compresskit.errors import RequestError, UnsupportedArchitecture
from compresskit.evaluation.request import scoring_bytes
from compresskit.job import HELD_BACK
from compresskit.models import layouts
from compresskit.models.fewer_blocks import configuration, kinds_by_block, remaining_tensors, text_configuration
from compresskit.models.model import Model, config_value, is_expert
from compresskit.models.shapes import dense_shapes
from compresskit.pruning.depth.method import Depth
from compresskit.pruning.parts import PartsRequest
from compresskit.pruning.request import opened
from compresskit.stages import Options
from compresskit.walk.cost import FLOAT32_BYTES, SUMMED_BYTES, block_bytes, head_share, held_bytes, walk_bytes

ANGLE_WINDOWS = 16
"""Calibration windows on which angles are measured, as for cfsp's block importances."""
LOSS_WINDOWS = 4
"""Calibration windows on which the whole model's divergence is measured, once for every candidate of every round."""
PASSES_REFIT = 2.0
"""The original's stream, and the pruned model's, twice, from the first gap on: 1.8 measured with a gap in the middle."""
SHARED_BLOCKS = "num_kv_shared_layers"
"""Key of config.json with the number of last blocks that take keys and values from earlier ones."""
SEEN_BY = "vision_config.deepstack_visual_indexes"
"""Key of config.json: to as many first blocks the model adds what its vision tower saw."""


@dataclass(frozen=True)
class DepthRequest(PartsRequest):
    """A request to remove blocks of a model."""

    method: Depth
    parts = "blocks"

    @property
    def count(self) -> int:
        """Number of blocks to remove."""
        return self.method.removed_of(self.model.block_count)

    def check(self) -> None:
        """Refuse what cannot lose blocks.

        Raises:
            RequestError: the source is in low bits, or no block would go, or too many.
            UnsupportedArchitecture: what stays would not be the blocks that it was.
        """
        model = self.model
        self.check_dense()
        self._check_count()
        self.check_known()
        if shared := text_configuration(model).values.get(SHARED_BLOCKS):
            raise UnsupportedArchitecture(
                f"{model.family}: its last {shared} blocks take keys and values of earlier ones ({SHARED_BLOCKS}); "
                "prune its channels instead"
            )
        self._check_structure()

    def _check_count(self) -> None:
        blocks, asked, method = self.model.block_count, self.count, self.method
        flag = f"--sparsity {method.sparsity:g}" if method.blocks is None else f"--blocks {method.blocks}"
        if asked == 0:
            raise RequestError(f"{flag}: is less than half of one of {blocks} blocks; pass --blocks 1")
        if asked >= blocks:
            raise RequestError(f"{flag}: the model has {blocks} blocks, of which one at least has to stay; remove fewer")

    def _check_structure(self) -> None:
        """Refuse a model whose blocks depend on their numbers, or of which too few may go."""
        from compresskit.models.same_blocks import check_same_blocks

        blocks = self.model.block_count
        tried = ({0, blocks - 1}, {0}, {blocks - 1}, set(self.planned))
        check_same_blocks(self.model, next(each for each in tried if len(each) < blocks and self.allows(each)))
        if len(self.planned) < self.count:
            raise UnsupportedArchitecture(
                f"{self.model.family}: of its {blocks} blocks at most {len(self.planned)} can go, because one of each kind "
                f"has to stay{f' and the first {self.fixed} see images' if self.fixed else ''}; remove fewer"
            )

    @cached_property
    def fixed(self) -> int:
        """Number of first blocks that stay: what a vision tower saw is added on the way to them, by their numbers."""
        found = config_value(self.model.checkpoint.config, SEEN_BY)
        return len(found) + 1 if isinstance(found, list) else 0

    @cached_property
    def kinds(self) -> list[tuple[str, ...]]:
        """What config.json calls each block."""
        return kinds_by_block(self.model)

    def allows(self, removed: Collection[int]) -> bool:
        """Whether these blocks may go together: one of each kind stays, and all of the `fixed`."""
        left = {kind for index, kind in enumerate(self.kinds) if index not in removed}
        return left == set(self.kinds) and all(index >= self.fixed for index in removed)

    @cached_property
    def planned(self) -> list[int]:
        """The blocks that go before any text is read: the last ones that may, but for the very last."""
        found: list[int] = []
        blocks = self.model.block_count
        for index in [*reversed(range(blocks - 1)), blocks - 1]:
            if len(found) < self.count and self.allows([*found, index]):
                found.append(index)
        return sorted(found)

    def outputs(self, removed: Collection[int] | None = None) -> Outputs:
        """The checkpoint's files; `removed` None: without the blocks that are `planned`."""
        gone = self.planned if removed is None else removed
        return Outputs(remaining_tensors(self.model, gone), configuration(self.model, gone), files=layouts.own_files(self.model))

    def result_model(self) -> Model:
        """The model with fewer blocks."""
        return dense_shapes(self.model, self.outputs())

    def passes(self) -> float:
        """Forward passes of a window through all blocks: the choice, the refit, the judgement on what is held back."""
        share, samples = 1 + head_share(self.model), self.options.samples
        if self.method.choose == "loss":
            rounds = greedy_passes(self.model.block_count, self.count, self.method.candidates, head_share(self.model))
            chosen = min(LOSS_WINDOWS, samples) * rounds
        else:
            chosen = min(ANGLE_WINDOWS, samples)
        refitted = PASSES_REFIT * samples if self.method.refit != "none" else 0.0
        return self.sampling_passes + chosen + refitted + 2 * HELD_BACK * share

    def peak_bytes(self) -> int:
        """Peak bytes: of the choice, of the refit, or of the judgement."""
        model, length, samples = self.model, self.options.sequence_length, self.options.samples
        if self.method.choose == "loss":
            windows, streams = min(LOSS_WINDOWS, samples), model.block_count + 1
        else:
            windows, streams = min(ANGLE_WINDOWS, samples), self.count if self.method.choose == "run" else 0
        chosen = walk_bytes(model, (windows, length), 0) + streams * held_bytes(model, windows * length)
        features = max(model.linear_shape(name)[1] for name in model.linears) + model.hidden_size
        solved = (SUMMED_BYTES + FLOAT32_BYTES) * features**2 + block_bytes(model)
        refitted = walk_bytes(model, (samples, length), solved) + held_bytes(model, samples * length)
        scored = scoring_bytes(model, max(HELD_BACK, LOSS_WINDOWS) * length)
        return max(chosen, refitted if self.method.refit != "none" else 0, scored)


def greedy_passes(blocks: int, removed: int, candidates: int, head: float) -> float:
    """Count the passes of a window in which blocks are removed one at a time.

    Of k blocks that are left, the model's own stream runs all; the one without block i runs those after it, half of the others
    if all are tried, and is taken to do so where only `candidates` are. `head`: the head's work as a share of all blocks'.

    Returns:
        Passes through all blocks.
    """
    passes = 0.0
    for k in range(blocks, blocks - removed, -1):
        tried = min(k, candidates or k) if k < blocks else k
        passes += (k + tried * (k - 1) / 2) / blocks + tried * head
    return passes


def last_writer(model: Model, index: int) -> str | None:
    """Find the linear that may end block `index`: the last in compute order that writes hidden states.

    Returns:
        Its plain name; None where only experts do, or linears that no stage edits.
    """
    sequence = model.linear_sequence(index)
    for group in sequence[-1] if sequence else []:
        if len(group) == 1 and not is_expert(group[0]) and model.linear_shape(group[0])[0] == model.hidden_size:
            return group[0]
    return None


def open_request(method: Depth, source_name: str, out: Path, options: Options) -> DepthRequest:
    """Open and check a request to remove blocks; see `opened`."""
    return opened(DepthRequest, method, source_name, out, options)
