"""A folder that appears under its final name whole or not at all; what is unfinished lies in `OUT.partial/`. Loads no torch."""

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
"""Ending of a file that is to replace another."""


def partial_folder(out: Path) -> Path:
    """Where the output is written until it is whole."""
    return out.with_name(out.name + ".partial")


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_folder(out: Path) -> Path:
    """An empty folder in which the output is made."""
    partial = partial_folder(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit_folder(out: Path) -> None:
    """Sync the partial folder and give it its final name, replacing an older one."""
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
    """Yield the folder to write into; it gets its final name at the end, and goes where anything was raised."""
    partial = start_folder(out)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    commit_folder(out)


@contextmanager
def _replacing(path: Path, temporary: Path) -> Iterator[None]:
    """What is written to the temporary file takes the place of `path` at the end; it goes where anything was raised."""
    try:
        yield
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_whole(path: Path, text: str) -> None:
    """A text file that is either as it was or as it shall be."""
    temporary = path.with_name(path.name + NEW)
    with _replacing(path, temporary):
        temporary.write_text(text, encoding="utf-8")


def write_whole_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """A safetensors file that is on the disk whole or not at all; of two processes that write it the later one wins.

    Raises:
        CheckpointError: the disk does not take it.
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
    """Copy those of the files that there are, byte for byte."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            (target / name).chmod(FILE_MODE)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a manifest."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.chmod(FILE_MODE)
