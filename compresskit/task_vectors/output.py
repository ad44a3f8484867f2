"""Output folder of `expand` and `merge`: an adapter that stock peft loads, or a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compresskit.checkpoint.folder import copy_files
from compresskit.checkpoint.outputs import Outputs
from compresskit.checkpoint.reader import TensorSpec, read_json
from compresskit.checkpoint.writer import Writer
from compresskit.formats.peft import CONFIG, WEIGHTS

NO_FINGERPRINT = ""
"""These outputs are never resumed."""


def outputs_like(folder: Path, specs: list[TensorSpec], is_adapter: bool) -> Outputs:
    """Weight files of an adapter, or of a checkpoint with the configuration in `folder`."""
    if is_adapter:
        return Outputs(extra={WEIGHTS: specs})
    return Outputs(specs, read_json(folder / "config.json"))


@contextmanager
def new_folder(out: Path, outputs: Outputs, shard_bytes: int, source: Path) -> Iterator[Writer]:
    """Create a folder; it is removed after an exception.

    `source` is the folder whose small files are copied, such as a checkpoint's tokenizer or an adapter's configuration.

    Yields:
        The writer, which needs every tensor and the manifest.
    """
    with Writer(out, outputs, shard_bytes, NO_FINGERPRINT) as writer:
        try:
            writer.start(source)
            if outputs.config is None and CONFIG not in outputs.files:
                copy_files((CONFIG,), source, writer.partial)
            yield writer
        except BaseException:
            shutil.rmtree(writer.partial, ignore_errors=True)
            raise
