"""Bring stored tensors into the system's page cache before they are read.

The cache is memory that the system takes back when something else needs it, so nothing is added to what `plan` states.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from threading import Event

from compresskit.checkpoint.byte_ranges import stamp_of
from compresskit.checkpoint.reader import Checkpoint
from compresskit.checkpoint.small_files import check_regular
from compresskit.errors import CheckpointError

CHUNK_BYTES = 1 << 22


def held_names(checkpoint: Checkpoint, prefix: str) -> list[str]:
    """Names, in file order, of the tensors with this prefix that the files hold, whether they are read as they are or not."""
    held = checkpoint.stored.tensors if checkpoint.stored else checkpoint.tensors
    return [name for name in held if name.startswith(prefix) and name in checkpoint.file_of]


def read_ahead(checkpoint: Checkpoint, names: Iterable[str], stop: Event) -> None:
    """Read tensors and keep nothing of them; ends early at `stop`, at a damaged file, and at one that has changed."""
    for path, group in groupby(names, lambda name: checkpoint.file_of[name]):
        try:
            check_regular(path)
            _read_through(path, checkpoint, list(group), stop)
        except (OSError, CheckpointError):
            return  # whoever reads the tensor next says what is wrong with the file


def _read_through(path: Path, checkpoint: Checkpoint, names: list[str], stop: Event) -> None:
    header, buffer = checkpoint.headers.get(path), bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as opened:
        file = opened.fileno()
        if header is None or header.stamp != stamp_of(file):
            return
        ranges = [(header.starts[name], header.starts[name] + header.specs[name].bytes) for name in names]
        if hasattr(os, "posix_fadvise"):  # the disk gets all requests at once; network file systems may ignore the advice
            for start, end in ranges:
                os.posix_fadvise(file, start, end - start, os.POSIX_FADV_WILLNEED)
        for start, end in ranges:
            for position in range(start, end, CHUNK_BYTES):
                if stop.is_set():
                    return
                os.preadv(file, [memoryview(buffer)[: end - position]], position)
