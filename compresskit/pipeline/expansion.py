"""`expand`: a ternary task vector becomes a normal PEFT adapter, or with its base a normal checkpoint."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from compresskit import source
from compresskit.checkpoint import writer as writing
from compresskit.checkpoint.folder import FILE_MODE, copy_files, whole_folder, write_json
from compresskit.checkpoint.reader import Checkpoint, TensorSpec, open_checkpoint, read_json, sha256
from compresskit.errors import RequestError
from compresskit.formats.peft import CONFIG, WEIGHTS
from compresskit.manifest import NAME, manifest
from compresskit.memory import peak_memory_bytes
from compresskit.pipeline.device import parse_bytes
from compresskit.pipeline.result import stage_result
from compresskit.progress import ProgressBars
from compresskit.restored import check_base, restored
from compresskit.task_vectors import TernaryVector, facts_of, open_task_vector, stored_bytes

WHOLE_NUMBERS = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
"""torch's names of the dtypes of buffers, which lie dense beside a vector."""


class ExpandOptions(BaseModel):
    """How to expand."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    base: str | None = None
    """The checkpoint to which the vector is added; for a vector of a whole checkpoint."""
    max_shard_size: str = "5GB"
    """Largest weight file of a checkpoint."""
    overwrite: bool = False
    """Replace an existing OUT, at the end."""


def expand(source_name: str, out: Path, options: ExpandOptions, quiet: bool = True) -> dict[str, Any]:
    """Expand a ternary task vector.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        RequestError: the source is no ternary vector, or needs another base.
        CheckpointError: the file is damaged; as with all errors nothing then appears under `out`.
    """
    started = time.monotonic()
    shard_bytes = parse_bytes(options.max_shard_size)
    vector = open_task_vector(source.resolve(source_name), None)
    if not isinstance(vector, TernaryVector):
        raise RequestError(f"{vector.folder}: is no ternary task vector; there is nothing to expand")
    base = open_checkpoint(source.resolve(options.base)) if options.base else None
    check_base(vector, base)
    base = None if vector.is_adapter else base
    specs = {**vector.specs, **vector.dense}
    writing.check_out(out, vector.folder, sum(spec.bytes for spec in specs.values()), options.overwrite)
    settings = {"method": "expand", "base": options.base}
    with ProgressBars(quiet) as bars:
        if vector.is_adapter:
            size = _expand_adapter(vector, specs, out, settings, bars)
        else:
            assert base is not None
            size = _expand_checkpoint(vector, base, out, (shard_bytes, settings), bars)
    parameters = sum(spec.elements for spec in specs.values())
    before = parameters, vector.container.path.stat().st_size
    found = stage_result("expand", settings, out, vector.folder, before, (parameters, size)) | facts_of(vector)
    return found | {"seconds": round(time.monotonic() - started, 3), "peak_memory_bytes": peak_memory_bytes()}


def _as_source(vector: TernaryVector) -> Checkpoint:
    """The vector's folder as the manifest names its source."""
    path = vector.folder / NAME
    specs = {**vector.specs, **vector.dense}
    found = read_json(path) if path.is_file() else None
    return Checkpoint(vector.folder, {}, specs, dict.fromkeys(specs, vector.container.path), found)


def write_adapter(path: Path, specs: list[TensorSpec], read: Any) -> None:
    """An adapter's safetensors file, a tensor at a time. `read`: the bytes of a tensor by its name."""
    (shard,) = writing.layout_shards(specs, sum(spec.bytes for spec in specs))
    with path.open("wb") as file:
        file.write(shard.header)
        for spec in specs:
            file.seek(shard.offsets[spec.name])
            file.write(read(spec.name))
    path.chmod(FILE_MODE)


def _expand_adapter(
    vector: TernaryVector, specs: dict[str, TensorSpec], out: Path, settings: dict[str, Any], bars: ProgressBars
) -> int:
    names = list(specs)

    def read(name: str) -> bytes:
        bars("expanding", names.index(name), len(names))
        return stored_bytes(restored(vector, name, None)) if name in vector.specs else vector.dense_bytes(name)

    with whole_folder(out) as partial:
        write_adapter(partial / WEIGHTS, list(specs.values()), read)
        copy_files((CONFIG,), vector.folder, partial)
        hashes = {WEIGHTS: sha256(partial / WEIGHTS)}
        write_json(partial / NAME, manifest("expand", settings, _as_source(vector), hashes, facts_of(vector)))
        return (partial / WEIGHTS).stat().st_size


def _expand_checkpoint(
    vector: TernaryVector, base: Checkpoint, out: Path, how: tuple[int, dict[str, Any]], bars: ProgressBars
) -> int:
    """`how`: (bytes of a shard, settings). Tensors in the base's order."""
    import torch

    from compresskit.checkpoint.dtypes import TORCH_DTYPES

    plan = [vector.specs.get(name) or vector.dense[name] for name in base.tensors if name in vector.specs or name in vector.dense]
    config = read_json(vector.folder / "config.json")
    with writing.Writer(out, plan, how[0], "") as writer:
        writer.start(config, vector.folder, {})
        for number, spec in enumerate(plan):
            bars("expanding", number, len(plan))
            if spec.name in vector.specs:
                writer.put(spec.name, restored(vector, spec.name, base))
            else:
                data = torch.frombuffer(bytearray(vector.dense_bytes(spec.name)), dtype=torch.uint8)
                dtype = TORCH_DTYPES.get(spec.dtype) or getattr(torch, WHOLE_NUMBERS[spec.dtype])
                writer.put(spec.name, data.view(dtype).reshape(spec.shape))
        writer.commit(manifest("expand", how[1], _as_source(vector), writer.hashes(), facts_of(vector)))
        return sum(shard.size for shard in writer.shards)
