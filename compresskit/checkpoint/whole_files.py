"""Write a file whole or not at all: to a name beside it, onto the disk, then in its place."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.errors import StorageError

if TYPE_CHECKING:
    from torch import Tensor

NEW = ".new"
"""Suffix of a file that will replace another."""
FORGOTTEN_SECONDS = 86_400
"""After a day, a file with that suffix was left by a process that was killed."""


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk; raises StorageError if the disk fails."""
    with storing(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the file."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise StorageError(f"{path}: cannot be written ({reason}); free some space, or use another disk") from error


@contextmanager
def _replacing(path: Path, temporary: Path) -> Iterator[None]:
    """Replace `path` with the temporary file at the end; remove the temporary file after an exception."""
    with storing(path):
        temporary.unlink(missing_ok=True)  # left by a killed process, or a link that somebody planted
        try:
            yield
            sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(path.parent)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give the temporary path to which a file is written; if two processes write it, the later one wins.

    Yields:
        The path, beside the final one.

    Raises:
        StorageError: the disk fails. After any error an older file is as it was.
    """
    _remove_forgotten(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{NEW}")
    with _replacing(path, temporary):
        yield temporary


def write_whole(path: Path, text: str) -> None:
    """Write a text file; raises StorageError if the disk fails, and leaves an older file as it is."""
    temporary = path.with_name(path.name + NEW)
    with _replacing(path, temporary), temporary.open("x", encoding="utf-8") as file:
        file.write(text)


def write_whole_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file; raises StorageError if the disk fails, and leaves an older file as it is."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_whole_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file; if two processes write it, the later one wins.

    Raises:
        StorageError: the disk fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    _remove_forgotten(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{NEW}")
    with _replacing(path, temporary):
        try:
            save_file(tensors, temporary)
        except SafetensorError as error:
            raise StorageError(f"{path}: cannot be written ({error}); free some space, or use another disk") from error


def _remove_forgotten(path: Path) -> None:
    """Remove what killed processes left of this file."""
    for left in path.parent.glob(f"{path.name}.*{NEW}"):
        with storing(left):
            if time.time() - left.stat().st_mtime > FORGOTTEN_SECONDS:
                left.unlink(missing_ok=True)
