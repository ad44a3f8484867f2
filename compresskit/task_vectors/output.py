"""Output folder of `expand` and `merge`: an adapter that stock peft loads, or a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compresskit.checkpoint.folder import held
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import Checkpoint, TensorSpec
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.side_files import copy_side_files
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.writer import Writer
from compresskit.formats.peft import CONFIG, WEIGHTS
from compresskit.formats.stored_forms import open_dense
from compresskit.models.layouts import own_config
from compresskit.task_vectors.vector import TaskVector, TernaryVector, is_ternary

NO_FINGERPRINT = ""
"""These outputs are never resumed."""


def outputs_like(folder: Path, specs: list[TensorSpec], is_adapter: bool) -> Outputs:
    """Weight files of an adapter, or of a checkpoint with the configuration in `folder`."""
    if is_adapter:
        return Outputs(extra={WEIGHTS: specs})
    config = read_json(folder / "config.json") if is_ternary(folder) else open_dense(folder).config
    return Outputs(specs, own_config(config))


def store_of(vector: TaskVector) -> Checkpoint:
    """The vector's weight files as an opened folder."""
    if not isinstance(vector, TernaryVector):
        return vector.store
    specs = {**vector.specs, **vector.dense}
    files = dict.fromkeys(specs, vector.container.path)
    return Checkpoint(vector.folder, {}, specs, files, read_manifest(vector.folder))


@contextmanager
def new_folder(out: Path, outputs: Outputs, shard_bytes: int, source: Path, overwrite: bool) -> Iterator[Writer]:
    """Create a folder; it is removed after an exception.

    `source` is the folder whose small files are copied, such as a checkpoint's tokenizer or an adapter's configuration.

    Yields:
        The writer, which needs every tensor and the manifest.
    """
    with held(out, overwrite) as work:
        writer = Writer(work, outputs, shard_bytes, lambda: NO_FINGERPRINT)
        writer.start(source)
        if outputs.config is None and CONFIG not in outputs.files:
            copy_side_files(source, writer.partial, (CONFIG,))
        yield writer
