"""Merge LoRA adapters of different ranks or linears: as weight updates, factorised again at one rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.small_files import read_json
from compresskit.errors import RequestError
from compresskit.formats import peft
from compresskit.formats.peft import CONFIG, WEIGHTS, Adapter, factor_names
from compresskit.methods import name_of
from compresskit.task_vectors.apply import applied_adapter, is_plain_lora
from compresskit.task_vectors.merging.method import MergeMethod, Values
from compresskit.task_vectors.scalings import scalings_of
from compresskit.task_vectors.trimming import Sections, trimmed
from compresskit.task_vectors.vector import PlainVector, TaskVector

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, int]]
"""(out, in) of linears by module name."""


@dataclass(frozen=True)
class UpdateMerge:
    """A merge of LoRA adapters, linear by linear."""

    method: MergeMethod
    adapters: list[Adapter]
    shapes: Shapes
    """Shapes of all linears that any adapter updates."""
    rank: int
    dtype: str
    """Safetensors dtype of the resulting factors."""

    def outputs(self) -> Outputs:
        """Weight files of the resulting adapter."""
        ranks = dict.fromkeys(self.shapes, self.rank)
        base = str(self.adapters[0].config.get("base_model_name_or_path") or "")
        factors = peft.adapter_specs(ranks, self.shapes.__getitem__, self.dtype)
        return Outputs(extra={WEIGHTS: factors}, files={CONFIG: peft.config_text(base, ranks)})

    def tensors(self, on_linear: Callable[[int, int], None]) -> Iterator[tuple[str, Tensor]]:
        """Merge linear by linear. `on_linear` is called with (linears done, total) before each.

        Yields:
            (name, a factor in its stored dtype and shape), in order.
        """
        import torch

        from compresskit.machine.precision import torch_dtype

        names = list(self.shapes)
        reads = [trimmed(update_reader(each, self.shapes), names, self.method.trims_to) for each in self.adapters]
        weights = self.method.source_weights(len(self.adapters))
        for number, name in enumerate(names):
            on_linear(number, len(names))
            merged = self.method.merge(np.stack([next(read(name)) for read in reads]), weights)
            update = torch.from_numpy(merged).reshape(self.shapes[name]) * self.method.scaling
            for factor_name, factor in zip(factor_names(name), truncated(update, self.rank), strict=True):
                yield factor_name, factor.to(torch_dtype(self.dtype))


def open_updates(method: MergeMethod, vectors: list[TaskVector], rank: int) -> UpdateMerge:
    """Open the vectors as adapters to merge at this rank.

    Returns:
        The merge; no weights are read.

    Raises:
        RequestError: the method needs all updates at once, a source is not a plain LoRA, two sources disagree on a shape, or
            the rank exceeds a linear.
    """
    if method.whole:
        name = name_of("merge", method)
        raise RequestError(f"--rank: {name} needs all updates in memory at once; use ties, or adapters of one rank")
    adapters = [as_adapter(vector) for vector in vectors]
    shapes = shapes_of(adapters)
    for name, shape in shapes.items():
        if rank > min(shape):
            raise RequestError(f"--rank {rank}: {name} is {list(shape)}; the rank is at most {min(shape)}")
    return UpdateMerge(method, adapters, shapes, rank, next(iter(vectors[0].specs.values())).dtype)


def as_adapter(vector: TaskVector) -> Adapter:
    """Open the vector as an adapter with readable updates.

    Returns:
        The adapter; no weights are read.

    Raises:
        CheckpointError: a factor has no partner, or the configuration states no scaling.
        RequestError: it is not a plain LoRA of linears.
    """
    config = read_json(vector.folder / CONFIG) if vector.is_adapter else {}
    if not is_plain_lora(config):
        raise RequestError(f"{vector.folder}: no plain LoRA adapter, which --rank needs; leave --rank out, or this source")
    for name in vector.specs:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            what = f"{name} is no factor of a linear, which --rank needs"
            raise RequestError(f"{vector.folder}: {what}; leave --rank out, or this source")
    scalings_of(vector)
    if isinstance(vector, PlainVector):
        return Adapter(vector.folder, config, vector.store)
    return applied_adapter(vector, config)


def shapes_of(adapters: list[Adapter]) -> Shapes:
    """Shape of every updated linear; raises RequestError if two adapters disagree."""
    shapes: Shapes = {}
    for adapter in adapters:
        for name in adapter.names:
            first, second = (adapter.store.spec(each).shape for each in factor_names(name))
            shape = (second[0], first[1])
            if shapes.setdefault(name, shape) != shape:
                raise RequestError(f"{adapter.folder}: {name} is {list(shape)}, elsewhere {list(shapes[name])}; same base?")
    return dict(sorted(shapes.items(), key=lambda item: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", item[0])]))


def update_reader(adapter: Adapter, shapes: Shapes) -> Sections:
    """Return a function from a linear's name to its flat update in one section; zeros if the adapter has none."""

    def read(name: str) -> Iterator[Values]:
        if not adapter.holds(name):
            yield np.zeros(shapes[name][0] * shapes[name][1], np.float32)
        else:
            yield adapter.update(name).reshape(-1).contiguous().numpy()

    return read


def truncated(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Compute the best product of that rank, balanced; exact if the update (out, in) has no larger rank.

    The singular vectors come from the smaller second-moment matrix in float64, four times as fast as a decomposition.

    Returns:
        (A (rank, in), B (out, rank)) float32.
    """
    import torch

    from compresskit.numerics.lowrank import balanced_factors

    wide = update.shape[0] <= update.shape[1]
    exact = update.double() if wide else update.double().T
    basis = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]
    first, second = basis.T @ exact, basis
    first, second = (first, second) if wide else (second.T, first.T)
    first, second = balanced_factors(first, second)
    return first.float(), second.float()
