"""`expand`: make a packed folder again, or turn a ternary task vector into a normal PEFT adapter or checkpoint.

A packed folder is a file, whose first bytes are checked (formats/archive/container.py); a task vector is a folder.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.checkpoint import source
from compresskit.checkpoint.manifest import check_unchanged, manifest
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.work_folder import check_out, check_space
from compresskit.errors import RequestError
from compresskit.formats.archive.restoring import restored_folder
from compresskit.formats.stored_forms import open_dense
from compresskit.machine.progress import ProgressBars
from compresskit.stages import parse_bytes
from compresskit.task_vectors.apply import applied_tensor, check_base
from compresskit.task_vectors.output import new_folder, outputs_like, store_of
from compresskit.task_vectors.request import ExpandOptions
from compresskit.task_vectors.vector import TernaryVector, facts_of, open_task_vector

if TYPE_CHECKING:
    from torch import Tensor


def expand(source_name: str, out: Path, options: ExpandOptions, quiet: bool = True) -> dict[str, Any]:
    """Make the folder of an archive, or expand a ternary task vector.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        RequestError: the source is neither, or needs another base, or none.
        CheckpointError: the file is damaged. After any error, `out` is not created.
    """
    started = time.monotonic()
    shard_bytes = parse_bytes(options.max_shard_size)
    path = source.resolve(source_name)
    if path.is_file():
        return _unpack(path, out, options, quiet) | time_and_memory(started)
    vector = open_task_vector(path, None)
    if not isinstance(vector, TernaryVector):
        raise RequestError(f"{vector.folder}: is no ternary task vector; there is nothing to expand")
    base = open_dense(source.resolve(options.base)) if options.base else None
    check_base(vector, base)
    base = None if vector.is_adapter else base
    stored = store_of(vector)
    check_out(out, vector.folder, options.overwrite)
    check_space(out, sum(spec.bytes for spec in stored.tensors.values()))
    for each in (stored, base) if options.verify else ():
        if each is not None:
            check_unchanged(each)
    names = [name for name in base.tensors if name in stored.tensors] if base else list(stored.tensors)
    outputs = outputs_like(vector.folder, [stored.tensors[name] for name in names], vector.is_adapter)
    settings = {"method": "expand", "base": options.base}
    with ProgressBars(quiet) as bars, new_folder(out, outputs, shard_bytes, vector.folder, options.overwrite) as writer:
        for number, name in enumerate(names):
            bars("expanding", number, len(names))
            writer.put(name, _tensor(vector, name, base))
        writer.commit(manifest("expand", settings, stored, writer.hashes(), facts_of(vector)))
    before, after = (stored.parameters, stored.bytes), (stored.parameters, writer.written[1])
    return stage_result("expand", settings, out, stored, before, after) | facts_of(vector) | time_and_memory(started)


def _unpack(path: Path, out: Path, options: ExpandOptions, quiet: bool) -> dict[str, Any]:
    """Make the folder that `pack` was given."""
    default = ExpandOptions()
    for name in ("base", "max_shard_size"):
        if getattr(options, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise RequestError(f"{path}: is an archive, whose files come out as they went in; leave out {flag}")
    with ProgressBars(quiet) as bars:
        found = restored_folder(path, out, options.overwrite, options.threads, bars.of("expanding"))
    settings = {"method": "expand", **options.model_dump(include={"base", "threads"})}
    result = stage_result("expand", settings, out, path, (None, path.stat().st_size), (None, found.bytes))
    return result | {"files": len(found.files), "digest": found.digest}


def _tensor(vector: TernaryVector, name: str, base: Checkpoint | None) -> Tensor:
    return applied_tensor(vector, name, base) if name in vector.specs else vector.dense_tensor(name)
