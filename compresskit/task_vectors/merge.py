"""`merge`: merge several task vectors, ternary or not, into one normal adapter, or with --base into one checkpoint.

vectors of the same tensors     merged entry by entry, LoRA factors at one scaling (merge_entries.py, scalings.py)
other LoRA adapters             merged as updates of the linears, (scaling B A), re-factorised at --rank (merge_updates.py)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.checkpoint import source
from compresskit.checkpoint.manifest import check_unchanged, manifest
from compresskit.checkpoint.reader import Checkpoint, sha256
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.small_files import shown
from compresskit.checkpoint.work_folder import check_out, check_space
from compresskit.errors import RequestError
from compresskit.formats.stored_forms import open_dense
from compresskit.machine.progress import ProgressBars
from compresskit.methods import name_of
from compresskit.stages import parse_bytes
from compresskit.task_vectors.agreement import notes_on_agreement
from compresskit.task_vectors.apply import check_base
from compresskit.task_vectors.candidates import NO_BASE, Scorer, check_validation, choose
from compresskit.task_vectors.merge_entries import EntryMerge, open_entries
from compresskit.task_vectors.merge_updates import UpdateMerge, open_updates
from compresskit.task_vectors.merging.method import MergeMethod
from compresskit.task_vectors.output import new_folder, store_of
from compresskit.task_vectors.pairs import factors_of
from compresskit.task_vectors.request import MergeOptions
from compresskit.task_vectors.vector import PlainVector, TaskVector, TernaryVector, named_base, open_task_vector


def merge(method: MergeMethod, sources: list[str], out: Path, options: MergeOptions, quiet: bool = True) -> dict[str, Any]:
    """Merge task vectors.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; `out` is then not created.
    """
    started = time.monotonic()
    _check_sources(sources)
    base_folder = source.resolve(options.base) if options.base else None
    vectors = [open_task_vector(source.resolve(each), base_folder) for each in sources]
    first = vectors[0]
    base = open_dense(base_folder) if base_folder and not first.is_adapter else None
    _check(method, vectors, base, options)
    notes = notes_on_agreement(vectors)
    shard_bytes = parse_bytes(options.max_shard_size)
    for vector in vectors:
        check_out(out, vector.folder, options.overwrite)
        check_space(out, sum(spec.bytes for spec in vector.specs.values()))
        if options.verify:
            check_unchanged(store_of(vector))
    job = _Job(vectors, base, base_folder, options)
    work, found = job.opened(method), dict[str, Any]()
    with (
        ProgressBars(quiet) as bars,
        new_folder(out, work.outputs(), shard_bytes, first.folder, options.overwrite) as writer,
    ):
        if options.validation:
            with writer.work.scratch() as scratch:
                method, found["candidates"] = job.chosen(method, scratch, bars.of("scoring candidates"))
            work = job.opened(method)
        for name, tensor in work.tensors(bars.of("merging")):
            writer.put(name, tensor)
        settings = job.settings(method) | {"sources": sources}
        writer.commit(_manifest(settings, vectors, writer.hashes()) | found)
    parameters = sum(spec.elements for vector in vectors for spec in vector.specs.values())
    before = parameters, sum(file.stat().st_size for file in _files(vectors))
    folders = [vector.folder for vector in vectors]
    result = stage_result("merge", settings, out, folders, before, writer.written)
    return result | found | ({"notes": notes} if notes else {}) | time_and_memory(started)


@dataclass(frozen=True)
class _Job:
    """Checked sources and how they are merged, for any settings of the method."""

    vectors: list[TaskVector]
    base: Checkpoint | None
    """Of whole checkpoints; None for adapters."""
    base_folder: Path | None
    options: MergeOptions

    def settings(self, method: MergeMethod) -> dict[str, Any]:
        """What the manifest says."""
        options = self.options
        scored = options.model_dump(include={"windows", "sequence_length", "dtype"}) if options.validation else {}
        kept = {"base": options.base, "rank": options.rank}
        return {"method": name_of("merge", method), **method.model_dump(), **kept, "validation": options.validation, **scored}

    def opened(self, method: MergeMethod) -> EntryMerge | UpdateMerge:
        """The merge; no weights are read."""
        if self.options.rank:
            return open_updates(method, self.vectors, self.options.rank, self.base_folder)
        return open_entries(method, self.vectors, self.base)

    def chosen(
        self, method: MergeMethod, scratch: Path, on_candidate: Callable[[int, int], None]
    ) -> tuple[MergeMethod, list[dict[str, Any]]]:
        """The settings with the least loss on the validation texts, and all that were tried. Writes each into `scratch`."""
        first, folder = self.vectors[0], scratch / "candidate"
        model = self.base or open_dense(self.base_folder or named_base(first, NO_BASE))
        scorer, shard_bytes = Scorer(model, first.is_adapter, self.options), parse_bytes(self.options.max_shard_size)

        def score(candidate: MergeMethod) -> list[float]:
            work = self.opened(candidate)
            with new_folder(folder, work.outputs(), shard_bytes, first.folder, overwrite=True) as writer:
                for name, tensor in work.tensors(lambda done, total: None):
                    writer.put(name, tensor)
                no_input = Checkpoint(folder, {}, {}, {})
                writer.commit(manifest("merge", self.settings(candidate), no_input, writer.hashes(), {}))
            return scorer.losses(folder)

        return choose(method, len(self.vectors), score, on_candidate)


def _check_sources(sources: Sequence[object]) -> None:
    """Refuse what is no list of two folders or more."""
    for each in sources:
        if not isinstance(each, str):
            what = f"a source is {shown(each)}, expected the folder of a task vector"
            raise RequestError(f"merge: {what}; list the folders one after the other, not in lists of their own")
    if len(sources) < 2:
        raise RequestError(f"{''.join(map(str, sources)) or 'merge'}: one source cannot be merged; give at least two, then OUT")


def _check(method: MergeMethod, vectors: list[TaskVector], base: Checkpoint | None, options: MergeOptions) -> None:
    """Refuse invalid requests before any work."""
    first = vectors[0]
    if method.weights and len(method.weights) != len(vectors):
        raise RequestError(f"--weights: {len(method.weights)} for {len(vectors)} sources; give one for each, or none")
    check_validation(vectors, options)
    for vector in vectors:
        if vector.is_adapter != first.is_adapter:
            raise RequestError(
                f"{vector.folder}: adapters and checkpoints cannot be merged; expand, or merge the adapters with peft"
            )
        if isinstance(vector, TernaryVector) and not vector.is_adapter:
            check_base(vector, base)
        if options.rank is None:
            _check_same_tensors(first, vector)


def _check_same_tensors(first: TaskVector, vector: TaskVector) -> None:
    if not vector.is_adapter:
        remedy = "merge checkpoints of one architecture, depth and width"
    elif any(factors_of(name) for name in vector.specs):
        remedy = "if both are of one base, pass --rank to merge them as updates of its weights"
    else:
        remedy = "merge adapters of the same modules"
    if isinstance(vector, TernaryVector) and vector.container.facts.balanced:
        raise RequestError(f"{vector.folder}: its factors were balanced, so that their ranks match no other's; {remedy}")
    for name in {**first.specs, **vector.specs}:
        shapes = [f"is {list(each.specs[name].shape)}" if name in each.specs else "is missing" for each in (first, vector)]
        if shapes[0] != shapes[1]:
            raise RequestError(f"{vector.folder}: {name} {shapes[1]}, but {shapes[0]} in {first.folder}; {remedy}")


def _files(vectors: list[TaskVector]) -> list[Path]:
    """Weight files of all sources, ternary ones first."""
    files = [vector.container.path for vector in vectors if isinstance(vector, TernaryVector)]
    return files + [file for vector in vectors if isinstance(vector, PlainVector) for file in vector.store.files]


def _manifest(settings: dict[str, Any], vectors: list[TaskVector], hashes: dict[str, str]) -> dict[str, Any]:
    """compresskit.json: the hashes of all sources replace the single input and its chain."""
    no_single_source = Checkpoint(vectors[0].folder, {}, {}, {})
    inputs = {"sha256": {str(file): sha256(file) for file in _files(vectors)}}
    return manifest("merge", settings, no_single_source, hashes, {}) | {"inputs": inputs}
