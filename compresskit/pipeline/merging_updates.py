"""Merging LoRA adapters of different ranks or linears: as updates of the weights, then factorised at one rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compresskit.checkpoint.reader import TensorSpec, read_json
from compresskit.errors import RequestError
from compresskit.formats.peft import CONFIG, Adapter, config_text, factor_names, plan
from compresskit.lowrank import balanced_factors
from compresskit.merge.method import MergeMethod, Values
from compresskit.pipeline.merging import Vector, trimmed, weights_of, write_merged_adapter
from compresskit.progress import ProgressBars
from compresskit.restored import Restored
from compresskit.task_vectors import PlainVector, TernaryVector, stored_bytes

if TYPE_CHECKING:
    from torch import Tensor


def as_adapter(vector: Vector) -> Adapter:
    """The vector as an adapter whose updates can be read; RequestError where it is no plain LoRA."""
    config = read_json(vector.folder / CONFIG) if vector.is_adapter else {}
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise RequestError(f"{vector.folder}: no plain LoRA adapter, which --rank needs; leave --rank out, or this source")
    if isinstance(vector, PlainVector):
        return Adapter(vector.folder, config, vector.store)
    assert isinstance(vector, TernaryVector)
    files = dict.fromkeys(vector.specs, vector.container.path)
    return Adapter(vector.folder, config, Restored(vector.folder, config, vector.specs, files, None, vector))


def shapes_of(adapters: list[Adapter]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear that an adapter updates; RequestError where two adapters disagree."""
    shapes: dict[str, tuple[int, int]] = {}
    for adapter in adapters:
        for name in adapter.names:
            first, second = (adapter.store.spec(each).shape for each in factor_names(name))
            shape = (second[0], first[1])
            if shapes.setdefault(name, shape) != shape:
                raise RequestError(f"{adapter.folder}: {name} is {list(shape)}, elsewhere {list(shapes[name])}; same base?")
    return dict(sorted(shapes.items(), key=lambda item: [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", item[0])]))


def update_reader(adapter: Adapter, shapes: dict[str, tuple[int, int]]) -> Callable[[str], Iterator[Values]]:
    """Name of a linear -> its update, flat, in one section; zeros where the adapter has none."""

    def read(name: str) -> Iterator[Values]:
        if not adapter.holds(name):
            yield np.zeros(shapes[name][0] * shapes[name][1], np.float32)
        else:
            yield adapter.update(name).reshape(-1).contiguous().numpy()

    return read


def truncated(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best product of that rank, balanced; exact where the update (out, in) has no larger rank.

    The singular vectors come from the smaller second-moment matrix in float64, four times as fast as a decomposition.

    Returns:
        (A (rank, in), B (out, rank)) float32.
    """
    import torch

    wide = update.shape[0] <= update.shape[1]
    exact = update.double() if wide else update.double().T
    basis = torch.linalg.eigh(exact @ exact.T).eigenvectors[:, -rank:]
    first, second = basis.T @ exact, basis
    first, second = (first, second) if wide else (second.T, first.T)
    first, second = balanced_factors(first, second)
    return first.float(), second.float()


def merge_updates(method: MergeMethod, vectors: list[Vector], out: Path, settings: dict[str, Any], bars: ProgressBars) -> int:
    """Merge at `--rank`, linear by linear.

    Returns:
        The bytes of the adapter's file.

    Raises:
        RequestError: the method needs all updates at once, a source is no plain LoRA, two sources disagree on a shape, or
            the rank exceeds a linear.
    """
    import torch

    from compresskit.checkpoint.dtypes import TORCH_DTYPES

    if method.whole:
        raise RequestError(f"--rank: {settings['method']} needs all updates in memory at once; use ties, or adapters of one rank")
    adapters = [as_adapter(vector) for vector in vectors]
    shapes = shapes_of(adapters)
    rank, dtype = int(settings["rank"]), next(iter(vectors[0].specs.values())).dtype
    for name, shape in shapes.items():
        if rank > min(shape):
            raise RequestError(f"--rank {rank}: {name} is {list(shape)}; the rank is at most {min(shape)}")
    names = list(shapes)
    read = trimmed([update_reader(adapter, shapes) for adapter in adapters], names, [method.trims_to] * len(adapters))
    weights = weights_of(method, len(vectors))
    pair: dict[str, Tensor] = {}
    linear_of = {factor: name for name in names for factor in factor_names(name)}

    def stored(factor: str) -> bytes:
        if factor not in pair:
            name = linear_of[factor]
            bars("merging", names.index(name), len(names))
            rows = [next(read(number, name)) for number in range(len(adapters))]
            merged = torch.from_numpy(method.merge(np.stack(rows), weights)).reshape(shapes[name]) * method.scaling
            pair.clear()
            pair.update(zip(factor_names(name), truncated(merged, rank), strict=True))
        return stored_bytes(pair[factor].to(TORCH_DTYPES[dtype]))

    specs: list[TensorSpec] = [spec for name in names for spec in plan(name, shapes[name], rank, dtype)]
    base = str(adapters[0].config.get("base_model_name_or_path") or "")
    return write_merged_adapter(out, specs, stored, vectors, settings, config_text(base, dict.fromkeys(names, rank)))
