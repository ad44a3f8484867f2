"""Make the folder of an archive again, bit by bit as it was; any damage is found and named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from compresskit.checkpoint.byte_ranges import fill
from compresskit.checkpoint.digests import sha256
from compresskit.checkpoint.folder import whole_folder
from compresskit.checkpoint.whole_files import storing
from compresskit.checkpoint.work_folder import check_out, check_space
from compresskit.errors import CheckpointError
from compresskit.formats.archive.container import AGAIN, Archive, open_archive
from compresskit.formats.archive.planes import Bytes
from compresskit.formats.archive.sections import Section, decode
from compresskit.formats.archive.threads import in_order, threads_to_use

Progress = Callable[[int, int], None]


def restored_folder(path: Path, out: Path, overwrite: bool, threads: int, progress: Progress) -> Archive:
    """Make the folder of an archive under the name OUT, whole or not at all.

    `threads`: their number, 0 for one a core.

    Returns:
        The archive.

    Raises:
        RequestError: OUT is something else, or there is no room.
        CheckpointError: the archive is damaged; OUT is then as it was.
    """
    archive = open_archive(path)
    check_out(out, path, overwrite)
    check_space(out, archive.bytes)
    with whole_folder(out, overwrite) as folder:
        restore(archive, folder, threads_to_use(threads), progress)
    return archive


def restore(archive: Archive, folder: Path, threads: int, progress: Progress) -> None:
    """Write all files of an archive into a new, empty folder.

    Raises:
        CheckpointError: a section is damaged, or a file is not what its SHA-256 says.
        StorageError: the disk fails.
    """
    paths = [folder / file.name for file in archive.files]
    for path, file in zip(paths, archive.files, strict=True):
        with storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb", buffering=0) as output:
                output.truncate(file.bytes)
    with archive.path.open("rb", buffering=0) as source:

        def work(item: tuple[Section, int]) -> int:
            section, start = item
            _write(paths[section.file], section, _decoded(archive, source.fileno(), section, start))
            return section.bytes

        done, total = 0, archive.bytes
        for length in in_order(work, zip(archive.sections, archive.starts(), strict=True), threads):
            progress(done := done + length, total)
    for file, digest in zip(archive.files, in_order(sha256, paths, threads), strict=True):
        if digest != file.sha256:
            raise CheckpointError(f"{archive.path}: {file.name} came out with another SHA-256 than it had; {AGAIN}")


def _decoded(archive: Archive, source: int, section: Section, start: int) -> Bytes:
    stored = bytearray(section.stored)
    try:
        fill(source, start, memoryview(stored))
        return decode(section, stored)
    except (CheckpointError, OSError, ValueError) as error:
        name, place = archive.files[section.file].name, section.places[0][0]
        raise CheckpointError(f"{archive.path}: the section of {name} from byte {place:,} on: {error}; {AGAIN}") from error


def _write(path: Path, section: Section, data: Bytes) -> None:
    """Write a section to its places. The file is open no longer: a folder may have more files than a process may open."""
    start = 0
    view = np.ascontiguousarray(data).data
    with storing(path), path.open("r+b", buffering=0) as output:
        for place, length in section.places:
            written = 0
            while written < length:
                written += os.pwrite(output.fileno(), view[start + written : start + length], place + written)
            start += length
