"""`quantize compeft`: turn a PEFT adapter, or a fine-tuned checkpoint and its base, into a ternary task vector.

Three passes over the stream of tensors (moments and upper bits, lower bits, signs) keep only one tensor in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.checkpoint import source
from compresskit.checkpoint.folder import whole_folder
from compresskit.checkpoint.manifest import check_unchanged, manifest
from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.side_files import SIDE_FILES, copy_side_files
from compresskit.checkpoint.whole_files import write_whole_json
from compresskit.checkpoint.work_folder import MANIFEST, check_out, check_space
from compresskit.errors import RequestError
from compresskit.evaluation.request import check_evaluation_text
from compresskit.formats.adapter_kinds import check_base_kept
from compresskit.formats.peft import CONFIG
from compresskit.formats.stored_forms import open_dense
from compresskit.formats.ternary.container import Facts, Part, Ternary, write_container
from compresskit.formats.ternary.golomb import entropy
from compresskit.formats.ternary.threshold import Threshold, Values
from compresskit.machine.progress import ProgressBars
from compresskit.models.layouts import own_config
from compresskit.task_vectors.alpha import check_scored, pick_alpha
from compresskit.task_vectors.apply import base_digest
from compresskit.task_vectors.compeft import ComPEFT, scale
from compresskit.task_vectors.pairs import COPY_OF_BASE, group_of
from compresskit.task_vectors.request import TernaryOptions
from compresskit.task_vectors.trimming import find_threshold
from compresskit.task_vectors.vector import (
    ADAPTER_FILE,
    MODEL_FILE,
    PlainVector,
    TaskVector,
    TernaryVector,
    facts_of,
    named_base,
    offset_of,
    open_task_vector,
    stored_bytes,
)

TRIAL_ALPHA = 1.0
"""Alpha of the file from which the candidates of --alpha auto are scored."""
NO_BASE = "pass --base for --alpha auto"
SIGN_HALF_BYTES, VALUE_HALF_BYTES = 1, 3
"""Disk space per entry, in half bytes: for a sign, and for a possible value."""


@dataclass(frozen=True)
class Measured:
    """Result of the counting passes."""

    threshold: Threshold
    std: float
    """Standard deviation of all entries."""
    kept_mean: float
    """Mean magnitude of the kept entries; 0 unless the variant needs it."""


Groups = dict[str, Measured]
"""By group of tensors (pairs.py), the result of the counting passes: what one group learned sets no scale of another."""


def compress(method: ComPEFT, source_name: str, out: Path, options: TernaryOptions, quiet: bool = True) -> dict[str, Any]:
    """Compress a task vector.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; `out` is then not created.
    """
    started = time.monotonic()
    folder = source.resolve(source_name)
    base_folder = source.resolve(options.base) if options.base else None
    vector = open_task_vector(folder, base_folder, method.balance)
    _check(method, vector, out, options)
    assert isinstance(vector, PlainVector)
    with ProgressBars(quiet) as bars, whole_folder(out, options.overwrite) as partial:
        measured = measure(vector, method, bars.of("measuring"))
        alpha, losses = method.alpha, dict[float, float]()
        if isinstance(alpha, str):
            trial = _write(vector, method, measured, TRIAL_ALPHA, partial)
            base = open_dense(base_folder or named_base(vector, NO_BASE))
            alpha, losses = pick_alpha(trial, base, options, bars.of("picking alpha"))
        written = _write(vector, method, measured, alpha, partial)
        facts = facts_of(written)
        facts["entropy_bits"] = entropy(facts["density_achieved"])
        facts |= {"validation_losses": losses} if losses else {}
        settings = {
            "method": "compeft",
            **method.model_dump(),
            "alpha": alpha,
            **options.model_dump(exclude={"overwrite", "verify"}),
        }
        path = written.container.path
        write_whole_json(partial / MANIFEST, manifest("quantize", settings, vector.store, {path.name: sha256(path)}, facts))
        size = path.stat().st_size
    before, after = (vector.store.parameters, vector.store.bytes), (vector.store.parameters, size)
    notes = {"notes": found} if (found := _notes(vector, size)) else {}
    return stage_result("quantize", settings, out, vector.store, before, after) | facts | notes | time_and_memory(started)


def _check(method: ComPEFT, vector: TaskVector, out: Path, options: TernaryOptions) -> None:
    """Refuse invalid requests before any work."""
    if isinstance(vector, TernaryVector):
        raise RequestError(f"{vector.folder}: is ternary already; compress the adapter or checkpoint it was made from")
    if (method.alpha == "auto") != (options.validation is not None):
        raise RequestError("--alpha auto and --validation belong together; pass both, or neither")
    if method.variant == "prune" and method.alpha != 1.0:
        raise RequestError(f"--alpha {method.alpha}: variant prune keeps the values as they are; leave --alpha out")
    if options.validation is not None:
        check_evaluation_text("--validation", options.validation, options.sequence_length)
        if vector.is_adapter and not options.base:
            named_base(vector, NO_BASE)
        if vector.is_adapter:
            check_scored(vector)
    if vector.is_adapter and vector.store.config.get("peft_type") == "LORA":
        check_base_kept(vector.folder / CONFIG, vector.store.config)
    half_bytes = VALUE_HALF_BYTES if method.variant == "prune" else SIGN_HALF_BYTES
    needed = half_bytes * sum(spec.elements for spec in vector.specs.values()) // 2
    check_out(out, vector.folder, options.overwrite)
    check_space(out, sum(spec.bytes for spec in vector.dense.values()) + needed)
    for each in (vector.store, vector.base) if options.verify else ():
        if each is not None:
            check_unchanged(each)


def _notes(vector: PlainVector, size: int) -> list[str]:
    """Say so where most of the file, of this size in bytes, is tensors that stay as they are."""
    dense = sorted(vector.dense.values(), key=lambda spec: -spec.bytes)
    kept = sum(spec.bytes for spec in dense)
    if not dense or 2 * kept < size:
        return []
    what = f"{kept / size:.0%} of the file are {len(dense)} tensors that stay as they are, such as {dense[0].name}"
    copies = any(spec.name.endswith(COPY_OF_BASE) for spec in dense)
    remedy = (
        "; peft's save_pretrained with save_embedding_layers=False leaves out copies of the base's embedding" if copies else ""
    )
    return [f"{what}, so that little is gained{remedy}"]


def measure(vector: PlainVector, method: ComPEFT, on_tensor: Callable[[int, int], None]) -> Groups:
    """Run the counting passes; raises RequestError if the vector is not finite."""
    done, total = 0, 2 * len(vector.specs)
    found = {}
    for group in dict.fromkeys(map(group_of, vector.specs)):
        names = [name for name in vector.specs if group_of(name) == group]
        spread, threshold = find_threshold(vector.values, names, method.density, _part_of(on_tensor, done, total))
        kept_mean = _kept_mean(vector, names, threshold) if method.variant == "stc" else 0.0
        found[group] = Measured(threshold, spread.std, kept_mean)
        done += 2 * len(names)
    return found


def _part_of(on_tensor: Callable[[int, int], None], start: int, total: int) -> Callable[[int, int], None]:
    return lambda done, _: on_tensor(start + done, total)


def _kept_mean(vector: PlainVector, names: list[str], threshold: Threshold) -> float:
    """Mean magnitude of the kept entries of these tensors, in a separate pass."""
    total, count = 0.0, 0
    cut = threshold.again()
    for name in names:
        for values in vector.values(name):
            signs = cut.cut(values)
            total += float((values.astype("float64") * signs).sum())
            count += int((signs != 0).sum())
    return total / max(1, count)


def _write(vector: PlainVector, method: ComPEFT, measured: Groups, alpha: float, partial: Path) -> TernaryVector:
    """Write the ternary file and the files beside it."""
    adapter = vector.is_adapter
    path = partial / (ADAPTER_FILE if adapter else MODEL_FILE)
    base = base_digest(vector.base) if vector.base else ""
    facts = Facts(method.variant, method.density, alpha, method.coding, base, vector.balance)
    factors = {group: scale(method.variant, alpha, each.std, each.kept_mean) for group, each in measured.items()}
    thresholds = {group: each.threshold.again() for group, each in measured.items()}
    places = ((name, spec, group_of(name)) for name, spec in vector.specs.items())
    tensors = (
        Ternary(
            spec,
            factors[group],
            offset_of(name) if adapter else 0.0,
            _parts(vector, name, thresholds[group], method.variant == "prune"),
        )
        for name, spec, group in places
    )
    write_container(path, facts, list(vector.dense.values()), vector.dense_bytes, tensors)
    copy_side_files(vector.folder, partial, (CONFIG,) if adapter else SIDE_FILES)
    if not adapter:
        write_whole_json(partial / "config.json", own_config(vector.store.config))
    written = open_task_vector(partial, None)
    assert isinstance(written, TernaryVector)
    return written


def _parts(vector: PlainVector, name: str, threshold: Threshold, keep_values: bool) -> Iterator[Part]:
    dtype = vector.specs[name].dtype
    for values in vector.values(name):
        signs = threshold.cut(values)
        yield Part(signs, _value_bytes(values[signs != 0], dtype) if keep_values else b"")


def _value_bytes(values: Values, dtype: str) -> bytes:
    """Bytes of the values as stored in a tensor of that safetensors dtype."""
    import torch

    from compresskit.machine.precision import torch_dtype

    return stored_bytes(torch.from_numpy(values).to(torch_dtype(dtype)))
