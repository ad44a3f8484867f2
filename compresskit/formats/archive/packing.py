"""Write an archive of a folder. Every section is decoded again at once: what cannot come back is not written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compresskit.checkpoint.byte_ranges import Stamp, fill, stamp_of
from compresskit.checkpoint.digests import sha256
from compresskit.checkpoint.side_files import side_files
from compresskit.checkpoint.small_files import inside
from compresskit.checkpoint.whole_files import storing
from compresskit.errors import CheckpointError, CompresskitError, RequestError
from compresskit.formats.archive.container import MAGIC, Archive, ArchivedFile, open_archive, write_index
from compresskit.formats.archive.planes import Bytes
from compresskit.formats.archive.planning import section_bytes, sections_of
from compresskit.formats.archive.sections import Section, decode, encode
from compresskit.formats.archive.threads import in_order

Progress = Callable[[int, int], None]
MOST_SECTIONS = 200_000
"""Of an index that small_files.py parses, 17 values each: a folder of 0.8 TB."""


@dataclass(frozen=True)
class FolderFile:
    """A file to pack."""

    path: Path
    name: str
    """Its path in the folder, with `/`."""
    stamp: Stamp

    @property
    def folder(self) -> Path:
        """The folder that is packed."""
        return self.path.parents[self.name.count("/")]


def files_of(folder: Path) -> list[FolderFile]:
    """Look for the files of a folder and its subfolders; a link stands for the file, which lies where side_files.py allows it.

    Returns:
        The files, sorted by path.

    Raises:
        CheckpointError: there is no such folder, nothing in it, what is no file, a link that leads out of
            the folder, or a name that other systems cannot hold.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder}: is a file, expected a folder; give a folder of weights")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give a folder of weights, a Hub id or demo:smollm2-135m")
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            if path.is_symlink():
                raise CheckpointError(f"{path}: is a link to a folder, which an archive cannot hold; put the folder in its place")
            continue
        name = path.relative_to(folder).as_posix()
        inside(folder, name, folder, subfolders=True)
        side_files(folder, (name,))
        try:
            with path.open("rb") as file:
                found.append(FolderFile(path, name, stamp_of(file.fileno())))
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not found:
        raise CheckpointError(f"{folder}: holds no file; give a folder of weights")
    return found


def digests_of(files: list[FolderFile], threads: int) -> dict[str, str]:
    """SHA-256 of every file, by name."""
    return dict(zip((file.name for file in files), in_order(sha256, (file.path for file in files), threads), strict=True))


def planned_sections(files: list[FolderFile]) -> list[Section]:
    """Cut all files into sections, from their headers.

    Returns:
        The sections, file by file.

    Raises:
        CheckpointError: a safetensors file is damaged.
        RequestError: they are more than an index holds.
    """
    total = sum(file.stamp.bytes for file in files)
    most = section_bytes(total)
    found = [each for number, file in enumerate(files) for each in sections_of(file.path, number, file.stamp.bytes, most)]
    if len(found) > MOST_SECTIONS:
        raise RequestError(
            f"{files[0].folder}: {total:,} bytes make {len(found):,} sections, an archive has {MOST_SECTIONS:,}; pack parts"
        )
    for file in files:
        _check_same(file)
    return found


def pack_files(
    files: list[FolderFile], sections: list[Section], digests: dict[str, str], path: Path, threads: int, progress: Progress
) -> Archive:
    """Write the archive of files whose sections and digests are known.

    Returns:
        The archive, opened again.

    Raises:
        CheckpointError: a file has changed meanwhile.
        RequestError: the index is larger than one that is read.
        StorageError: the disk fails.
    """
    total = sum(section.bytes for section in sections)
    written: list[Section] = []

    def work(section: Section) -> tuple[Section, bytes]:
        file = files[section.file]
        return _coded(file, section, _read(file, section))

    with storing(path), path.open("wb") as archive:
        archive.write(MAGIC)
        done = 0
        for section, stored in in_order(work, sections, threads):
            archive.write(stored)
            written.append(section)
            progress(done := done + section.bytes, total)
        for file in files:
            _check_same(file)
        entries = [ArchivedFile(file.name, file.stamp.bytes, digests[file.name]) for file in files]
        write_index(archive, entries, written)
    try:
        return open_archive(path)
    except CheckpointError as error:
        raise RequestError(f"{files[0].folder}: its archive cannot be opened again ({error}); pack parts") from error


def _read(file: FolderFile, section: Section) -> Bytes:
    """Read a section from its places. The file is open no longer: a folder may have more files than a process may open."""
    data = np.empty(section.bytes, np.uint8)
    start = 0
    try:
        with file.path.open("rb", buffering=0) as opened:
            for place, length in section.places:
                fill(opened.fileno(), place, data[start : start + length].data)
                start += length
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file.path}: cannot be read ({error}); use an intact copy") from error
    return data


def _coded(file: FolderFile, section: Section, data: Bytes) -> tuple[Section, bytes]:
    found, stored = encode(section, data, file.stamp.bytes)
    if not np.array_equal(decode(found, stored), data):
        raise CompresskitError(f"{file.path}: bytes {section.places[0]} do not come back; this is a bug, please report it")
    return found, stored


def _check_same(file: FolderFile) -> None:
    try:
        with file.path.open("rb") as now:
            same = stamp_of(now.fileno()) == file.stamp
    except OSError:  # removed, or replaced by what cannot be read
        same = False
    if not same:
        raise CheckpointError(f"{file.path}: changed while it was packed; start again when nothing writes to it")


def check_recorded(folder: Path, recorded: dict[str, str], digests: dict[str, str]) -> None:
    """Compare files with the SHA-256 that the folder's manifest recorded; raises CheckpointError."""
    for name, digest in recorded.items():
        if name not in digests:
            raise CheckpointError(
                f"{folder / name}: is not there, the manifest recorded it; use an intact copy, or pass --no-verify"
            )
        if digests[name] != digest:
            raise CheckpointError(
                f"{folder / name}: SHA-256 is {digests[name]}, the manifest recorded {digest}; use an intact copy, or pass "
                "--no-verify if you changed it"
            )


def check_outside(out: Path, folder: Path) -> None:
    """Refuse an archive inside the folder that it is made of; raises RequestError."""
    if folder.resolve() in out.resolve().parents:
        raise RequestError(f"{out}: lies inside the source {folder}; choose a place beside it")
