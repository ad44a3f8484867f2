"""Merge task vectors of the same tensors, entry by entry, one section at a time.

LoRA factors are merged at one scaling for each linear (scalings.py). Each source is trimmed first, as it is stored, so that
what is kept of it depends on no other source.

If all sources are ternary, a table of the 3**n patterns of n signs gives the merged entries. It holds exactly the values
that the float path would compute.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.small_files import shown
from compresskit.errors import RequestError
from compresskit.formats.adapter_kinds import BESIDE, check_base_kept
from compresskit.formats.peft import CONFIG
from compresskit.methods import name_of
from compresskit.task_vectors.dropping import dropped
from compresskit.task_vectors.kept import Kept, kept_as_they_are, kept_specs, kept_tensor
from compresskit.task_vectors.merging.method import MergeMethod, Values
from compresskit.task_vectors.merging.whole import merged_whole
from compresskit.task_vectors.output import outputs_like
from compresskit.task_vectors.scalings import CommonScaling, common_scaling
from compresskit.task_vectors.trimming import Sections, trimmed
from compresskit.task_vectors.vector import TaskVector, TernaryVector, adapter_config, offset_of

if TYPE_CHECKING:
    from torch import Tensor

PATTERNS = ("rank_pattern", "alpha_pattern")
SCALED_BY = (*PATTERNS, "r", "lora_alpha", "use_rslora")
"""Keys of adapter_config.json that decide how strongly factors act."""
MOST_PATTERNS = 3**10
"""Above ten ternary sources the table of patterns would take longer than the floats."""


@dataclass(frozen=True)
class EntryMerge:
    """A merge of vectors of the same tensors."""

    method: MergeMethod
    vectors: list[TaskVector]
    base: Checkpoint | None
    """Base of whole checkpoints; None for adapters."""
    scaling: CommonScaling
    """At which LoRA factors are merged."""
    kept: Kept
    """Tensors outside the vectors that the result keeps."""

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Tensors of the result."""
        return self.vectors[0].specs

    def outputs(self) -> Outputs:
        """Weight files of the result."""
        specs = [*self.specs.values(), *kept_specs(self.kept)]
        return outputs_like(self.vectors[0].folder, specs, self.base is None)

    def tensors(self, on_tensor: Callable[[int, int], None]) -> Iterator[tuple[str, Tensor]]:
        """Merge tensor by tensor. `on_tensor` is called with (tensors done, total) before each.

        Yields:
            (name, the tensor in its stored dtype and shape), in order.

        Raises:
            RequestError: a merged factor exceeds its dtype at the first source's scaling, or every merged update of the
                adapters is zero; known only at the end.
        """
        import torch

        from compresskit.machine.precision import torch_dtype

        sections, nonzero = self.merged_sections(), set[str]()
        for number, (name, spec) in enumerate(self.specs.items()):
            on_tensor(number, len(self.specs))
            merged = torch.from_numpy(np.concatenate([*sections(name), np.zeros(0, np.float32)])) * self.method.scaling
            if bool(merged.any()):
                nonzero.add(name)
            merged += self.base.read(name).reshape(-1).float() if self.base else offset_of(name)
            written = self.scaling.written(name)
            stored = (merged if written == 1 else merged * written).to(torch_dtype(spec.dtype))
            if written != 1 and not bool(stored.isfinite().all()):
                raise self.scaling.too_large(name, spec.dtype)
            yield name, stored.reshape(spec.shape)
        for name in self.kept:
            yield name, kept_tensor(self.kept, name)
        if self.base is None:
            self._check_any_update(nonzero)

    def _check_any_update(self, nonzero: set[str]) -> None:
        """Raise RequestError if all lora_B are zero, and so all updates are."""
        second_factors = {name for name in self.specs if ".lora_B." in name}
        if second_factors and not second_factors & nonzero:
            raise RequestError(
                f"{self.vectors[0].folder}: {name_of('merge', self.method)} keeps nothing of any lora_B, which leaves no update "
                "(where lora_A is far larger, it takes all places); pass --rank, which merges the updates of the weights"
            )

    def merged_sections(self) -> Sections:
        """The merged vector, without `scaling`; each of its tensors can be read once, in order."""
        names = list(self.specs)
        method = self.method
        every = [dropped(each.values, method.drop, method.drop_seed, source) for source, each in enumerate(self.vectors)]
        kept = [trimmed(read, names, self._trims_to(vector)) for vector, read in zip(self.vectors, every, strict=True)]
        reads = [self._scaled(source, sections) for source, sections in enumerate(kept)]
        if method.whole:
            return merged_whole(method, reads, {name: spec.elements for name, spec in self.specs.items()})
        return lambda name: self._merged_tensor(reads, name)

    def _scaled(self, source: int, sections: Sections) -> Sections:
        """The sections of a source at the common scaling; as they are where that is its own."""

        def read(name: str) -> Iterator[Values]:
            share = self.scaling.share(source, name)
            return sections(name) if share == 1 else (share * values for values in sections(name))

        return read

    def _trims_to(self, vector: TaskVector) -> float:
        """1 for ternary vectors, which are already trimmed."""
        return 1.0 if isinstance(vector, TernaryVector) else self.method.trims_to

    def _merged_tensor(self, reads: list[Sections], name: str) -> Iterator[Values]:
        """Sections (entries,) of one merged tensor, without `scaling`. `reads` gives the values of each vector."""
        method, weights = self.method, self.method.source_weights(len(reads))
        ternary = [v.container for v in self.vectors if isinstance(v, TernaryVector) and v.container.facts.variant != "prune"]
        if len(ternary) == len(reads) and 3 ** len(reads) <= MOST_PATTERNS and not method.drop:
            own = [np.float32(each.tensors[name].scale) for each in ternary]
            table = pattern_table(method, [float(self.scaling.share(i, name) * s) for i, s in enumerate(own)], weights)
            for parts in zip(*(each.parts(name) for each in ternary), strict=True):
                codes = np.zeros(len(parts[0].signs), np.uint16)
                for power, part in enumerate(parts):
                    codes += np.uint16(3**power) * (part.signs + np.int8(1)).astype(np.uint16)
                yield table[codes]
            return
        for rows in zip(*(read(name) for read in reads), strict=True):
            yield method.merge(np.stack(rows), weights)


def pattern_table(method: MergeMethod, scales: list[float], weights: Values) -> Values:
    """Merged value of every pattern of n signs, (3**n,); the pattern's index is sum_i 3**i (sign_i + 1)."""
    patterns = np.array(list(itertools.product((-1, 0, 1), repeat=len(scales))), np.float32)[:, ::-1].T
    return method.merge(np.ascontiguousarray(patterns * np.array(scales, np.float32)[:, None]), weights)


def open_entries(method: MergeMethod, vectors: list[TaskVector], base: Checkpoint | None) -> EntryMerge:
    """Open vectors of the same tensors to merge entry by entry.

    Returns:
        The merge; no weights are read.

    Raises:
        CheckpointError: an adapter's configuration states no scaling, or a LoRA factor has no partner.
        RequestError: the first source's configuration cannot state what the result is, or the sources differ in a tensor that
            is no part of the vectors.
    """
    for vector in vectors:
        check_same_kind(vectors[0], vector)
    scaling = common_scaling(vectors)
    scaling.check_written()
    return EntryMerge(method, vectors, base, scaling, kept_as_they_are(vectors))


def check_same_kind(first: TaskVector, vector: TaskVector) -> None:
    """Raise RequestError unless the parameters of two adapters mean the same, so that they can be compared entry by entry."""
    mine, other = adapter_config(vector), adapter_config(first)
    path = vector.folder / CONFIG
    if mine.get("peft_type") == "LORA":
        check_base_kept(path, mine, "merge with --rank, which merges updates of the weights, or ")
    # Patterns name parameters of experts, the stored factors do not: which one a pattern means cannot be told.
    unclear = any(each.get("target_parameters") and any(map(each.get, PATTERNS)) for each in (mine, other))
    for key in (*BESIDE, "peft_type", "feedforward_modules", *(SCALED_BY if unclear else ())):
        values = [_sorted(each.get(key)) for each in (mine, other)]
        if any(values) and values[0] != values[1]:
            what = f"{key} is {shown(mine.get(key))}, but {shown(other.get(key))} in {first.folder / CONFIG}"
            raise RequestError(f"{path}: {what}, so that their parameters mean different things; leave one of the two out")


def _sorted(value: Any) -> Any:
    """A list in an order of its own: peft saves sets in any order."""
    return sorted(map(str, value)) if isinstance(value, list) else value
