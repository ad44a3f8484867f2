"""`merge`: several task vectors, ternary or not, become one normal adapter, or with --base one checkpoint.

vectors of the same tensors     merged entry by entry, in sections; where all are ternary, through a table of the
                                3**n patterns that n signs can show, which holds what the floats would give
other LoRA adapters             as updates of the linears, (scaling B A), re-factorised at --rank
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from compresskit import source
from compresskit.checkpoint import writer as writing
from compresskit.checkpoint.folder import copy_files, whole_folder, write_json
from compresskit.checkpoint.reader import Checkpoint, TensorSpec, open_checkpoint, read_json, sha256
from compresskit.errors import RequestError
from compresskit.formats.peft import CONFIG, WEIGHTS
from compresskit.manifest import NAME, fingerprint
from compresskit.memory import peak_memory_bytes
from compresskit.merge.method import MergeMethod, Values
from compresskit.methods import name_of
from compresskit.pipeline.device import parse_bytes
from compresskit.pipeline.expansion import write_adapter
from compresskit.pipeline.result import stage_result
from compresskit.progress import ProgressBars
from compresskit.restored import check_base
from compresskit.task_vectors import PlainVector, TernaryVector, offset_of, open_task_vector, stored_bytes
from compresskit.ternary.threshold import Spread, Threshold
from compresskit.version import VERSION

MOST_PATTERNS = 3**10
"""Above ten ternary sources the table of patterns would take longer than the floats."""
Vector = PlainVector | TernaryVector
Read = Callable[[int, str], Iterator[Values]]
"""(number of a source, name of a tensor) -> its values in sections."""


class MergeOptions(BaseModel):
    """Besides the method's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """The checkpoint that the sources were fine-tuned from; for whole checkpoints, which are merged into one."""
    rank: Annotated[int, Field(ge=1)] | None = None
    """Merge LoRA adapters as updates of the weights and factorise the result at this rank."""
    max_shard_size: str = "5GB"
    """Largest weight file of a checkpoint."""
    overwrite: bool = False
    """Replace an existing OUT, at the end."""


def merge(method: MergeMethod, sources: list[str], out: Path, options: MergeOptions, quiet: bool = True) -> dict[str, Any]:
    """Merge task vectors.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; nothing then appears under `out`.
    """
    started = time.monotonic()
    base_folder = source.resolve(options.base) if options.base else None
    vectors = [open_task_vector(source.resolve(each), base_folder) for each in sources]
    base = open_checkpoint(base_folder) if base_folder and not vectors[0].is_adapter else None
    _check(method, vectors, base, options)
    shard_bytes = parse_bytes(options.max_shard_size)
    for vector in vectors:
        writing.check_out(out, vector.folder, sum(spec.bytes for spec in vector.specs.values()), options.overwrite)
    settings = {"method": name_of("merge", method), **method.model_dump(), "sources": sources, "base": options.base}
    settings["rank"] = options.rank
    with ProgressBars(quiet) as bars:
        if options.rank:
            from compresskit.pipeline.merging_updates import merge_updates

            size = merge_updates(method, vectors, out, settings, bars)
        else:
            size = _merge_entries(method, vectors, (base, out, shard_bytes), settings, bars)
    parameters = [sum(spec.elements for spec in vector.specs.values()) for vector in vectors]
    before = sum(parameters), sum(_file_bytes(vector) for vector in vectors)
    found = stage_result("merge", settings, out, [vector.folder for vector in vectors], before, (parameters[0], size))
    return found | {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}


def _file_bytes(vector: Vector) -> int:
    return vector.container.path.stat().st_size if isinstance(vector, TernaryVector) else vector.store.bytes


def _check(method: MergeMethod, vectors: list[Vector], base: Checkpoint | None, options: MergeOptions) -> None:
    """What can be refused before any work."""
    first = vectors[0]
    if len(vectors) < 2:
        raise RequestError(f"{first.folder}: one source cannot be merged; give at least two, then OUT")
    if method.weights and len(method.weights) != len(vectors):
        raise RequestError(f"--weights: {len(method.weights)} for {len(vectors)} sources; give one for each, or none")
    for vector in vectors:
        if vector.is_adapter != first.is_adapter:
            raise RequestError(
                f"{vector.folder}: adapters and checkpoints cannot be merged; expand, or merge the adapters with peft"
            )
        if vector.dense:
            name = next(iter(vector.dense))
            raise RequestError(f"{vector.folder}: {name} is no part of the vector and cannot be merged; leave this source out")
        if isinstance(vector, TernaryVector) and not vector.is_adapter:
            check_base(vector, base)
        if options.rank is None:
            _check_same(first, vector)


def _check_same(first: Vector, vector: Vector) -> None:
    remedy = "pass --rank to merge them as updates of the weights"
    balanced = isinstance(vector, TernaryVector) and vector.container.facts.balanced
    if balanced:
        raise RequestError(f"{vector.folder}: its factors were balanced, so that their ranks match no other's; {remedy}")
    for name in {**first.specs, **vector.specs}:
        found = [v.specs[name].shape if name in v.specs else None for v in (first, vector)]
        if found[0] != found[1]:
            raise RequestError(f"{vector.folder}: {name} is {found[1]} there, {found[0]} in {first.folder}; {remedy}")


def weights_of(method: MergeMethod, count: int) -> Values:
    """One weight a source, (sources,); 1 where the method names none."""
    return np.array(method.weights or [1.0] * count, np.float32)


def pattern_table(method: MergeMethod, scales: list[float], weights: Values) -> Values:
    """What every pattern of signs of n sources gives, (3**n,): pattern sum_i 3**i (sign_i + 1)."""
    patterns = np.array(list(itertools.product((-1, 0, 1), repeat=len(scales))), np.float32)[:, ::-1].T
    return method.merge(np.ascontiguousarray(patterns * np.array(scales, np.float32)[:, None]), weights)


def merged_sections(method: MergeMethod, vectors: list[Vector], name: str, read: Read) -> Iterator[Values]:
    """The merged vector of a tensor, without `scaling`, in sections (entries,)."""
    weights = weights_of(method, len(vectors))
    ternary = [v.container for v in vectors if isinstance(v, TernaryVector) and v.container.facts.variant != "prune"]
    if len(ternary) == len(vectors) and 3 ** len(vectors) <= MOST_PATTERNS:
        table = pattern_table(method, [each.tensors[name].scale for each in ternary], weights)
        for parts in zip(*(each.parts(name) for each in ternary), strict=True):
            codes = np.zeros(len(parts[0].signs), np.uint16)
            for power, part in enumerate(parts):
                codes += np.uint16(3**power) * (part.signs + np.int8(1)).astype(np.uint16)
            yield table[codes]
        return
    for rows in zip(*(read(number, name) for number in range(len(vectors))), strict=True):
        yield method.merge(np.stack(rows), weights)


def trimmed(reads: list[Callable[[str], Iterator[Values]]], names: list[str], densities: list[float]) -> Read:
    """Each source cut to this share of its largest entries, over the whole vector; 1 leaves it as it is."""
    cuts: list[Threshold | None] = [None] * len(reads)
    for number, (values, density) in enumerate(zip(reads, densities, strict=True)):
        if density == 1:
            continue
        spread = Spread()
        for part in itertools.chain.from_iterable(map(values, names)):
            spread.add(part)
        threshold = Threshold(spread, density)
        for part in itertools.chain.from_iterable(map(values, names)):
            threshold.add(part)
        threshold.settle()
        cuts[number] = threshold

    def read(number: int, name: str) -> Iterator[Values]:
        cut = cuts[number]
        for part in reads[number](name):
            yield part if cut is None else part * np.abs(cut.cut(part))

    return read


def merged_reader(method: MergeMethod, vectors: list[Vector]) -> Callable[[str], Iterator[Values]]:
    """Name -> the merged sections; tensors must be asked for in order, once each."""
    names = list(vectors[0].specs)
    densities = [1.0 if isinstance(vector, TernaryVector) else method.trims_to for vector in vectors]
    read = trimmed([vector.values for vector in vectors], names, densities)
    if not method.whole:
        return lambda name: merged_sections(method, vectors, name, read)
    rows = [np.concatenate([part for name in names for part in read(number, name)]) for number in range(len(vectors))]
    merged = method.merge(np.stack(rows), weights_of(method, len(vectors)))
    ends = dict(zip(names, itertools.accumulate(vectors[0].specs[name].elements for name in names), strict=True))
    return lambda name: iter([merged[ends[name] - vectors[0].specs[name].elements : ends[name]]])


def _merge_entries(
    method: MergeMethod, vectors: list[Vector], where: tuple[Checkpoint | None, Path, int],
    settings: dict[str, Any], bars: ProgressBars,
) -> int:  # fmt: skip
    """`where`: (base, out, bytes of a shard)."""
    import torch

    from compresskit.checkpoint.dtypes import TORCH_DTYPES

    base, out, shard_bytes = where
    specs, sections = vectors[0].specs, merged_reader(method, vectors)
    names = list(specs)
    second_factors = {name for name in names if ".lora_B." in name}
    kept = set[str]()  # tensors of which the method keeps anything, so far

    def tensor(name: str) -> torch.Tensor:
        bars("merging", names.index(name), len(names))
        found = torch.from_numpy(np.concatenate([*sections(name), np.zeros(0, np.float32)])) * method.scaling
        if bool(found.any()):
            kept.add(name)
        found += base.read(name).reshape(-1).float() if base else offset_of(name)
        return found.to(TORCH_DTYPES[specs[name].dtype]).reshape(specs[name].shape)

    if base is None:

        def checked(name: str) -> bytes:
            found = stored_bytes(tensor(name))
            if name == names[-1] and second_factors and not second_factors & kept:
                raise RequestError(
                    f"{vectors[0].folder}: {settings['method']} keeps nothing of any lora_B, which leaves no update (where "
                    "lora_A is far larger, it takes all places); merge by average, task-arithmetic or ties, with --rank"
                )
            return found

        return write_merged_adapter(out, list(specs.values()), checked, vectors, settings)
    key = fingerprint("merge", settings)
    with writing.Writer(out, [specs[name] for name in names], shard_bytes, key) as writer:
        writer.start(read_json(vectors[0].folder / "config.json"), vectors[0].folder, {})
        for name in names:
            writer.put(name, tensor(name))
        writer.commit(merge_manifest(settings, vectors, writer.hashes()))
        return sum(shard.size for shard in writer.shards)


def write_merged_adapter(
    out: Path, specs: list[TensorSpec], read: Callable[[str], bytes], vectors: list[Vector], settings: dict[str, Any],
    config: str | None = None,
) -> int:  # fmt: skip
    """The folder of an adapter; returns its bytes. `config`: the first source's where none is given."""
    with whole_folder(out) as partial:
        write_adapter(partial / WEIGHTS, specs, read)
        if config is None:
            copy_files((CONFIG,), vectors[0].folder, partial)
        else:
            (partial / CONFIG).write_text(config, encoding="utf-8")
        write_json(partial / NAME, merge_manifest(settings, vectors, {WEIGHTS: sha256(partial / WEIGHTS)}))
        return (partial / WEIGHTS).stat().st_size


def merge_manifest(settings: dict[str, Any], vectors: list[Vector], outputs: dict[str, str]) -> dict[str, Any]:
    """compresskit.json: with the hashes of every source in place of one chain."""
    files = [v.container.path for v in vectors if isinstance(v, TernaryVector)]
    files += [file for v in vectors if isinstance(v, PlainVector) for file in v.store.files]
    return {
        "format_version": 1, "tool": "compresskit", "version": VERSION, "stage": "merge", "method": settings["method"],
        "settings": settings, "inputs": {"sha256": {str(file): sha256(file) for file in files}},
        "outputs": {"sha256": outputs}, "facts": {}, "source": None,
    }  # fmt: skip
