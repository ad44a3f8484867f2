"""The work folder `OUT.partial/`: its layout, whose it is, and what OUT may be. Nothing is changed here; see folder.py."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresskit.checkpoint.lock import check_unlocked
from compresskit.checkpoint.small_files import read_json
from compresskit.errors import CompresskitError, RequestError

MANIFEST = "compresskit.json"
LOCK = "compresskit.lock"
SPARE_BYTES = 1 << 24
"""Disk space reserved for the small files (16 MiB)."""


@dataclass(frozen=True)
class WorkFolder:
    """`OUT.partial/`, in which a stage makes OUT."""

    out: Path
    overwrite: bool = False
    """Whether an older OUT is to be replaced."""

    @property
    def path(self) -> Path:
        """The work folder itself."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def lock(self) -> Path:
        """The lock file."""
        return self.path / LOCK

    @property
    def result(self) -> Path:
        """The folder that becomes OUT."""
        return self.path / "result"

    @property
    def progress(self) -> Path:
        """The record of finished blocks."""
        return self.path / "progress.json"

    @property
    def training(self) -> Path:
        """Folder of intermediate results of a fine-tuning or a search."""
        return self.path / "training"

    @property
    def commit_record(self) -> Path:
        """The record of a complete result."""
        return self.path / "commit.json"

    @property
    def replaced(self) -> Path:
        """The old OUT between two renames."""
        return self.path / "replaced"

    @property
    def old(self) -> Path:
        """What is being removed."""
        return self.path / "old"

    @property
    def is_committed(self) -> bool:
        """Whether the complete result that was made here has got the name OUT, and may have been removed from there since."""
        try:
            recorded = read_json(self.commit_record)["manifest"]
        except (CompresskitError, KeyError):  # there is none, or none that was written whole
            return False
        return bool(recorded == manifest_digest(self.out) or recorded != manifest_digest(self.result))

    @property
    def is_worth_keeping(self) -> bool:
        """Whether there is finished work in it that is not in OUT yet."""
        begun = self.progress.is_file() or self.training.is_dir() or self.commit_record.is_file()
        return begun and not self.is_committed

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield a folder for files that nobody needs afterwards."""
        folder = self.path / "scratch"
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
            yield Path(scratch)


def manifest_digest(folder: Path) -> str | None:
    """SHA-256 of a folder's manifest, None if it has none."""
    try:
        return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return None


def is_ours(folder: Path) -> bool:
    """Whether a folder may be replaced: it is empty, or a manifest shows that a stage of this tool made it."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return not any(folder.iterdir())
    try:
        return read_json(manifest).get("tool") == "compresskit"
    except CompresskitError:
        return False


def check_out(out: Path, source: Path, overwrite: bool, resume: bool = False) -> None:
    """Check an output folder before anything is written.

    Raises:
        RequestError: it exists (unless `overwrite`, or `resume`, which may find it finished) or is not ours, another process
            is at work in it, it lies inside the source or contains it, or is not writable.
    """
    check_name(out)
    if os.path.lexists(out):
        if not (overwrite or resume):
            raise RequestError(f"{out}: exists already; choose another folder, or pass --overwrite")
        check_replaceable(out)
    work = WorkFolder(out)
    existing = _nearest(out)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise RequestError(f"{existing}: cannot be written to; choose another output folder")
    check_work_is_ours(work)
    check_unlocked(work.lock, out)
    resolved, inside = out.resolve(), source.resolve()
    if resolved == inside or inside in resolved.parents:
        raise RequestError(f"{out}: lies inside the source {source}; choose a folder beside it")
    if resolved in inside.parents:
        raise RequestError(f"{out}: contains the source {source}; choose a folder beside it")


def check_space(out: Path, needed_bytes: int) -> None:
    """Raise RequestError if the disk of OUT has less than `needed_bytes` free."""
    existing = _nearest(out)
    free = shutil.disk_usage(existing).free
    if free < needed_bytes + SPARE_BYTES:
        raise RequestError(
            f"{out}: the result needs about {needed_bytes / 1e9:.2f} GB, {existing} has {free / 1e9:.2f} GB free; "
            "free some space, or choose another disk"
        )


def _nearest(out: Path) -> Path:
    """The nearest folder above OUT that exists."""
    return next(parent for parent in out.resolve().parents if parent.exists())


def check_name(out: Path) -> None:
    """Refuse an OUT that names no folder of its own; raises RequestError."""
    if not out.name or out.name == "..":
        raise RequestError(f"{out}: names no new folder; choose another OUT")


def check_replaceable(out: Path) -> None:
    """Refuse to replace what is not ours; raises RequestError."""
    if out.is_symlink():
        raise RequestError(f"{out}: is a symbolic link to {out.readlink()}; give the folder itself, or remove the link")
    if not out.is_dir():
        raise RequestError(f"{out}: is a file, not a folder; choose another path")
    if not is_ours(out):
        raise RequestError(
            f"{out}: was not made by a stage of compresskit (it has no {MANIFEST} of one), so it is not replaced; "
            "move it away, or choose another OUT"
        )


def check_work_is_ours(work: WorkFolder) -> None:
    """Refuse a folder under the work folder's name that is none."""
    path = work.path
    try:
        if not path.is_symlink() and (work.lock.is_file() or not any(path.iterdir())):
            return
    except FileNotFoundError:
        return
    except NotADirectoryError:
        pass
    raise RequestError(
        f"{path}: is in the way of unfinished output and not of this version's making; move or remove it, or choose another OUT"
    )


def read_progress(work: WorkFolder, fingerprint: str) -> dict[str, Any] | None:
    """Read the progress of an interrupted run of the same request.

    Returns:
        The progress for `Writer.resume`, or None if there is nothing to resume.

    Raises:
        RequestError: the unfinished output belongs to another request.
    """
    if not work.progress.is_file():
        return None
    progress = read_json(work.progress, finite=False)
    if progress.get("fingerprint") != fingerprint:
        raise RequestError(f"{work.path}: left by a run with other inputs or settings; repeat those, or drop --resume")
    kinds = {key: type(progress.get(key)) for key in ("blocks", "written", "facts")}
    if kinds != {"blocks": list, "written": list, "facts": dict} or not {type(each) for each in progress["blocks"]} <= {int}:
        raise RequestError(f"{work.progress}: is not as it was left; start again, without --resume")
    return progress
