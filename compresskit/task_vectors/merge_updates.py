"""Merge LoRA adapters of different ranks or modules: as updates of the weights, factorised again at one rank.

Updates of linears, of embeddings (lora_embedding_A and _B) and of biases (lora_B.bias) are merged. An adapter whose factors start
from its base (PiSSA, OLoRA) is read as stock peft reads it, on that base.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import TensorSpec
from compresskit.errors import RequestError
from compresskit.formats import peft
from compresskit.formats.adapter_kinds import base_change, check_plain
from compresskit.formats.peft import CONFIG, WEIGHTS, Adapter
from compresskit.models.initialised import PlainFactors
from compresskit.models.load import attached, open_model
from compresskit.task_vectors.apply import applied_adapter
from compresskit.task_vectors.dropping import dropped
from compresskit.task_vectors.kept import Kept, kept_as_they_are, kept_specs, kept_tensor
from compresskit.task_vectors.merging.method import MergeMethod, Values
from compresskit.task_vectors.merging.whole import merged_whole
from compresskit.task_vectors.pairs import BIAS, COPY_OF_BASE, EMBEDDING, factors_of, module_of, pair_of
from compresskit.task_vectors.scalings import scalings_of
from compresskit.task_vectors.trimming import Sections, trimmed
from compresskit.task_vectors.vector import PlainVector, TaskVector, adapter_config, named_base

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Update:
    """What adapters change of one weight: of a linear, of an embedding, or a bias."""

    names: tuple[str, ...]
    """Of A and B; of a bias alone."""
    shape: tuple[int, ...]
    """(out, in) of the product B A, or (out,) of a bias."""


Updates = dict[str, Update]
"""By the name of the last of its tensors."""


@dataclass(frozen=True)
class UpdateMerge:
    """A merge of LoRA adapters, weight by weight."""

    method: MergeMethod
    adapters: list[Adapter]
    updates: Updates
    """All weights that any adapter updates."""
    kept: Kept
    """Tensors outside the vectors that the result keeps."""
    rank: int
    dtype: str
    """Safetensors dtype of the resulting factors."""

    def outputs(self) -> Outputs:
        """Weight files of the resulting adapter."""
        ranks = {module_of(name): self.rank for name, update in self.updates.items() if len(update.names) > 1}
        base = str(self.adapters[0].config.get("base_model_name_or_path") or "")
        config = peft.configuration(base, ranks) | ({"lora_bias": True} if any(map(_is_bias, self.updates)) else {})
        specs = [self._spec(name, update) for update in self.updates.values() for name in update.names]
        return Outputs(extra={WEIGHTS: [*specs, *kept_specs(self.kept)]}, files={CONFIG: json.dumps(config, indent=2) + "\n"})

    def _spec(self, name: str, update: Update) -> TensorSpec:
        if _is_bias(name):
            return TensorSpec(name, self.dtype, update.shape)
        rows, columns = update.shape
        return TensorSpec(name, self.dtype, (self.rank, columns) if name == update.names[0] else (rows, self.rank))

    def tensors(self, on_weight: Callable[[int, int], None]) -> Iterator[tuple[str, Tensor]]:
        """Merge weight by weight. `on_weight` is called with (weights done, total) before each.

        Yields:
            (name, a tensor in its stored dtype and shape), in order.
        """
        from compresskit.machine.precision import torch_dtype

        merged = self._merged_values()
        for number, (name, update) in enumerate(self.updates.items()):
            on_weight(number, len(self.updates))
            for part_name, part in zip(update.names, self._parts(name, update, merged), strict=True):
                yield part_name, part.to(torch_dtype(self.dtype))
        for name in self.kept:
            yield name, kept_tensor(self.kept, name)

    def _parts(self, name: str, update: Update, merged: Sections) -> tuple[Tensor, ...]:
        """(A, B) of a merged weight, or (bias,), float32."""
        import torch

        from compresskit.numerics.truncation import truncated

        change = torch.from_numpy(next(merged(name))).reshape(update.shape) * self.method.scaling
        return (change,) if _is_bias(name) else truncated(change, self.rank)

    def _merged_values(self) -> Sections:
        """The merged updates, without `scaling`, each in one section; each can be read once, in order."""
        method, names = self.method, list(self.updates)
        weights = method.source_weights(len(self.adapters))
        every = [update_reader(each, self.updates) for each in self.adapters]
        every = [dropped(read, method.drop, method.drop_seed, source) for source, read in enumerate(every)]
        reads = [trimmed(read, names, method.trims_to) for read in every]
        if method.whole:
            sizes = {name: int(np.prod(update.shape)) for name, update in self.updates.items()}
            return merged_whole(method, reads, sizes)
        return lambda name: iter([method.merge(np.stack([next(read(name)) for read in reads]), weights)])


def _is_bias(name: str) -> bool:
    return name.endswith(BIAS)


def open_updates(method: MergeMethod, vectors: list[TaskVector], rank: int, base: Path | None) -> UpdateMerge:
    """Open the vectors as adapters to merge at this rank. `base` is the folder of their base, by default the one they name.

    Returns:
        The merge; no weights are read, but for tensors outside the vectors.

    Raises:
        RequestError: a source is no plain LoRA, two sources disagree on a shape, nothing is updated, or the rank exceeds a
            weight.
    """
    adapters = [as_adapter(vector, base) for vector in vectors]
    updates = updates_of(adapters)
    for name, update in updates.items():
        if not _is_bias(name) and rank > min(update.shape):
            what = f"{module_of(name)} is {list(update.shape)}; the rank is at most {min(update.shape)}"
            raise RequestError(f"--rank {rank}: {what}")
    embeddings = {module_of(name) for name in updates if EMBEDDING in name}
    if embeddings and any(map(_is_bias, updates)):
        what = f"updates of embeddings ({min(embeddings)}) and of biases are in no adapter together, as peft has none"
        raise RequestError(f"{adapters[0].folder}: {what}; merge the sources apart")
    # Of a linear from whose weight factors start, peft saves what is left of the weight, not the weight.
    changed = {module_of(name) for each in adapters if isinstance(each.store, PlainFactors) for name in each.store.linears}
    copies = {f"{peft.PREFIX}{module}{COPY_OF_BASE}" for module in set(map(module_of, updates)) - changed}
    kept = kept_as_they_are(vectors, copies.__contains__)
    return UpdateMerge(method, adapters, updates, kept, rank, next(iter(vectors[0].specs.values())).dtype)


def as_adapter(vector: TaskVector, base: Path | None) -> Adapter:
    """Open the vector as an adapter with readable updates. `base` is the folder of its base, by default the one that it names.

    Returns:
        The adapter; no weights are read.

    Raises:
        CheckpointError: a factor has no partner, or the configuration states no scaling.
        RequestError: it is no plain LoRA, or does not fit the base from which its factors start.
    """
    if not vector.is_adapter:
        raise RequestError(f"{vector.folder}: is a checkpoint, --rank merges LoRA adapters; leave --rank out")
    config, path = adapter_config(vector), vector.folder / CONFIG
    check_plain(path, config)
    for name in vector.specs:
        if factors_of(name) is None:
            raise RequestError(f"{vector.folder}: {name} is no LoRA parameter, which --rank needs; leave this source out")
    scalings_of(vector)
    if isinstance(vector, PlainVector):
        adapter = Adapter(vector.folder, config, vector.store)
    else:
        adapter = applied_adapter(vector, config)
    if base_change(path, config):
        model = open_model(base or named_base(vector, "pass --base, from which its factors start"))
        adapter = attached(model, adapter).adapter or adapter
    return adapter


def updates_of(adapters: list[Adapter]) -> Updates:
    """All updates, in the order of the model; raises RequestError if two adapters disagree on a shape, or none has any."""
    found: Updates = {}
    for adapter in adapters:
        for name in adapter.store.tensors:
            pair = pair_of(name)
            if pair is None and not (factors_of(name) and _is_bias(name)):
                continue
            if pair is not None and name != pair[1]:
                continue
            names = pair or (name,)
            first, last = adapter.store.spec(names[0]).shape, adapter.store.spec(names[-1]).shape
            update = Update(names, (last[0], first[1]) if pair else last)
            if found.setdefault(name, update) != update:
                shapes = f"{list(update.shape)}, elsewhere {list(found[name].shape)}"
                raise RequestError(f"{adapter.folder}: {module_of(name)} is {shapes}; same base?")
    if not found:
        raise RequestError(f"{adapters[0].folder}: no source updates any weight; point to trained adapters")
    if any(map(_is_bias, found)):
        biases = {name.removesuffix(".weight") + BIAS: (update.shape[0],) for name, update in found.items() if not _is_bias(name)}
        found |= {name: Update((name,), shape) for name, shape in biases.items()}  # peft's lora_bias is for all linears
    return dict(sorted(found.items(), key=lambda item: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", item[0])]))


def update_reader(adapter: Adapter, updates: Updates) -> Sections:
    """Return a function from an update's name to its flat values in one section; zeros if the adapter has none."""

    def read(name: str) -> Iterator[Values]:
        if name not in adapter.store.tensors:
            yield np.zeros(int(np.prod(updates[name].shape)), np.float32)
            return
        parts = [adapter.store.read(each).float() for each in updates[name].names]
        scaling = adapter.stated.scaling(module_of(name), _rank(adapter, name))
        change = parts[0] if len(parts) == 1 else parts[1] @ parts[0]
        yield (scaling * change).reshape(-1).contiguous().numpy()

    return read


def _rank(adapter: Adapter, name: str) -> int:
    """Rank of the pair to which a LoRA parameter belongs."""
    pair = factors_of(name)
    assert pair is not None
    return adapter.store.spec(pair[0]).shape[0]
