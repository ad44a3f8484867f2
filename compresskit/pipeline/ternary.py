"""`quantize compeft`: a PEFT adapter, or a fine-tuned checkpoint and its base, becomes a ternary task vector.

Three passes over the stream of tensors (moments and upper bits, lower bits, signs), so that memory holds one tensor.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from compresskit import source
from compresskit.checkpoint.folder import copy_files, whole_folder, write_json
from compresskit.checkpoint.reader import Checkpoint, open_checkpoint, sha256
from compresskit.checkpoint.writer import SIDE_FILES, check_out
from compresskit.errors import RequestError
from compresskit.formats.peft import CONFIG
from compresskit.manifest import NAME, manifest
from compresskit.memory import peak_memory_bytes
from compresskit.pipeline.evaluation import check_evaluation_text
from compresskit.pipeline.result import stage_result
from compresskit.progress import ProgressBars
from compresskit.quantize.compeft import ComPEFT, scale
from compresskit.restored import base_digest
from compresskit.task_vectors import ADAPTER_FILE, MODEL_FILE, PlainVector, TernaryVector, facts_of, offset_of, open_task_vector
from compresskit.ternary.container import Facts, Part, Ternary, write_container
from compresskit.ternary.golomb import entropy
from compresskit.ternary.threshold import Spread, Threshold

PLACEHOLDER = 1.0
"""The factor of the scale while the candidates of --alpha auto are scored."""
BYTES_AT_MOST = 3
"""Of an entry in the worst case: a sign and a 16-bit value."""


class TernaryOptions(BaseModel):
    """What compeft takes besides its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """The checkpoint that SOURCE was fine-tuned from; for an adapter only --alpha auto reads it."""
    validation: str | None = None
    """Text on which --alpha auto is picked: FILE.txt, .jsonl or .parquet, hub:DATASET."""
    windows: Annotated[int, Field(ge=1)] = 8
    """Windows of that text."""
    sequence_length: Annotated[int, Field(ge=2)] = 256
    """Tokens in a window."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; for --alpha auto."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the forward passes for --alpha auto."""
    overwrite: bool = False
    """Replace an existing OUT, at the end."""
    trust_remote_code: bool = False
    """Run the code that a checkpoint brings."""


@dataclass(frozen=True)
class Cut:
    """What the two counting passes found."""

    threshold: Threshold
    spread: Spread
    kept_mean: float
    """Mean magnitude of the kept entries; 0 unless the variant needs it."""


def compress(method: ComPEFT, source_name: str, out: Path, options: TernaryOptions, quiet: bool = True) -> dict[str, Any]:
    """Compress a task vector.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: the kind in errors.py tells what is wrong; nothing then appears under `out`.
    """
    started = time.monotonic()
    folder = source.resolve(source_name)
    base_folder = source.resolve(options.base) if options.base else None
    vector = open_task_vector(folder, base_folder, method.balance)
    _check(method, vector, out, options)
    assert isinstance(vector, PlainVector)
    with ProgressBars(quiet) as bars, whole_folder(out) as partial:
        cut = measure(vector, method, bars)
        alpha = method.alpha if isinstance(method.alpha, float) else None
        losses: dict[float, float] = {}
        if alpha is None:
            from compresskit.pipeline.alpha import pick_alpha

            trial = _write(vector, method, cut, PLACEHOLDER, partial)
            alpha, losses = pick_alpha(trial, open_checkpoint(base_folder or _named_base(vector)), options, bars)
        written = _write(vector, method, cut, alpha, partial)
        facts = facts_of(written) | {"entropy_bits": entropy(facts_of(written)["density_achieved"])}
        facts |= {"validation_losses": losses} if losses else {}
        settings = {"method": "compeft", **method.model_dump(), "alpha": alpha, **options.model_dump(exclude={"overwrite"})}
        hashes = {written.container.path.name: sha256(written.container.path)}
        write_json(partial / NAME, manifest("quantize", settings, vector.store, hashes, facts))
        size = written.container.path.stat().st_size
    parameters = vector.store.parameters
    found = stage_result("quantize", settings, out, folder, (parameters, vector.store.bytes), (parameters, size)) | facts
    return found | {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}


def _check(method: ComPEFT, vector: PlainVector | TernaryVector, out: Path, options: TernaryOptions) -> None:
    """What can be refused before any work."""
    if isinstance(vector, TernaryVector):
        raise RequestError(f"{vector.folder}: is ternary already; compress the adapter or checkpoint it was made from")
    if (method.alpha == "auto") != (options.validation is not None):
        raise RequestError("--alpha auto and --validation belong together; pass both, or neither")
    if method.variant == "prune" and method.alpha != 1.0:
        raise RequestError(f"--alpha {method.alpha}: variant prune keeps the values as they are; leave --alpha out")
    if options.validation is not None:
        check_evaluation_text("--validation", options.validation, options.sequence_length)
        if vector.is_adapter and not options.base:
            _named_base(vector)
    stored = sum(spec.bytes for spec in vector.dense.values())
    most = BYTES_AT_MOST if method.variant == "prune" else 1
    check_out(out, vector.folder, stored + most * sum(spec.elements for spec in vector.specs.values()) // 2, options.overwrite)


def _named_base(vector: PlainVector) -> Path:
    """The base that an adapter's configuration names."""
    name = vector.store.config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{vector.folder / CONFIG}: names no base model; pass --base for --alpha auto")
    return source.resolve(name)


def measure(vector: PlainVector, method: ComPEFT, bars: ProgressBars) -> Cut:
    """The two counting passes; RequestError where the vector is not finite or has no entries."""
    spread, names = Spread(), list(vector.specs)
    for number, name in enumerate(names):
        bars("measuring", number, 2 * len(names))
        for values in vector.values(name):
            spread.add(values)
    threshold = Threshold(spread, method.density)
    for number, name in enumerate(names, start=len(names)):
        bars("measuring", number, 2 * len(names))
        for values in vector.values(name):
            threshold.add(values)
    bars("measuring", 2 * len(names), 2 * len(names))
    threshold.settle()
    return Cut(threshold, spread, _kept_mean(vector, threshold) if method.variant == "stc" else 0.0)


def _kept_mean(vector: PlainVector, threshold: Threshold) -> float:
    """Mean magnitude of the kept entries, by a pass of its own."""
    total, count = 0.0, 0
    cut = threshold.again()
    for name in vector.specs:
        for values in vector.values(name):
            signs = cut.cut(values)
            total += float((values.astype("float64") * signs).sum())
            count += int((signs != 0).sum())
    return total / max(1, count)


def _write(vector: PlainVector, method: ComPEFT, cut: Cut, alpha: float, partial: Path) -> TernaryVector:
    """The file and what belongs beside it."""
    adapter = vector.is_adapter
    path = partial / (ADAPTER_FILE if adapter else MODEL_FILE)
    base = base_digest(vector.base) if vector.base else ""
    facts = Facts(method.variant, method.density, alpha, method.coding, base, vector.balance)
    factor = scale(method.variant, alpha, cut.spread.std, cut.kept_mean)
    threshold = cut.threshold.again()
    tensors = (
        Ternary(spec, factor, offset_of(name) if adapter else 0.0, _parts(vector, name, threshold, method.variant == "prune"))
        for name, spec in vector.specs.items()
    )
    write_container(path, facts, list(vector.dense.values()), vector.dense_bytes, tensors)
    copy_files((CONFIG,) if adapter else ("config.json", *SIDE_FILES), vector.folder, partial)
    written = open_task_vector(partial, None)
    assert isinstance(written, TernaryVector)
    return written


def _parts(vector: PlainVector, name: str, threshold: Threshold, keep_values: bool) -> Iterator[Part]:
    for values in vector.values(name):
        signs = threshold.cut(values)
        yield Part(signs, _kept_bytes(vector.store, name, values[signs != 0]) if keep_values else b"")


def _kept_bytes(store: Checkpoint, name: str, values: Any) -> bytes:
    import torch

    from compresskit.checkpoint.dtypes import TORCH_DTYPES
    from compresskit.task_vectors import stored_bytes

    return stored_bytes(torch.from_numpy(values).to(TORCH_DTYPES[store.spec(name).dtype]))
