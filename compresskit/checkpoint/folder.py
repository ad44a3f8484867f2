"""Write a folder atomically: unfinished output stays in `OUT.partial/` until it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compresskit.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FILE_MODE = 0o644
NEW = ".new"
"""Suffix of a file that will replace another."""


def partial_folder(out: Path) -> Path:
    """Folder that holds the output until it is complete."""
    return out.with_name(out.name + ".partial")


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_folder(out: Path) -> Path:
    """Create an empty folder for the output."""
    partial = partial_folder(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit_folder(out: Path) -> None:
    """Sync the partial folder and rename it to its final name, replacing an older one."""
    partial, replaced = partial_folder(out), out.with_name(out.name + ".replaced")
    for path in (*partial.rglob("*"), partial):
        sync(path)
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield the folder to write into; it is renamed at the end, or removed after an exception."""
    partial = start_folder(out)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    commit_folder(out)


@contextmanager
def _replacing(path: Path, temporary: Path) -> Iterator[None]:
    """Replace `path` with the temporary file at the end; remove the temporary file after an exception."""
    try:
        yield
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically."""
    temporary = path.with_name(path.name + NEW)
    with _replacing(path, temporary):
        temporary.write_text(text, encoding="utf-8")


def write_whole_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically; if two processes write it, the later one wins.

    Raises:
        CheckpointError: the disk cannot take it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f"{path.name}.{os.getpid()}{NEW}")
    try:
        with _replacing(path, temporary):
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error}); free some space") from error


def copy_files(names: tuple[str, ...], source: Path, target: Path) -> None:
    """Copy the files that exist, byte for byte."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            (target / name).chmod(FILE_MODE)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a manifest."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.chmod(FILE_MODE)
