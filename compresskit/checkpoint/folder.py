"""A folder appears whole, or not at all: the one place where OUT is locked, made, resumed, named and removed.

    OUT.partial/compresskit.lock   who is at work; shows that the folder is ours
               /result/            becomes OUT
               /progress.json      which blocks of it are on the disk (writer.py)
               /training/          what `recover` or `search` has done so far
               /scratch/           what nobody needs after the run
               /commit.json        the manifest of a complete result, written just before it becomes OUT
               /replaced/          the old OUT, where names cannot be exchanged in one step
               /old/               a folder while it is removed: an old OUT, or another one of these

A result becomes OUT by one rename, or by one exchange of two names if there is an older OUT. Where the system has no
exchange, a process that dies between two renames leaves OUT under `replaced/`; the next command brings it back. Only what a
manifest or the lock shows to be ours is removed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from compresskit import distributed
from compresskit.checkpoint.exchange import exchange
from compresskit.checkpoint.lock import acquire
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import storing, sync, write_whole_json
from compresskit.checkpoint.work_folder import (
    WorkFolder,
    check_replaceable,
    check_work_is_ours,
    is_ours,
    manifest_digest,
)
from compresskit.errors import NumericalError, RequestError, StorageError, StorageWarning

REQUEST = "request.json"
"""File with the fingerprint of the request that the intermediate results are of."""


@contextlib.contextmanager
def held(out: Path, overwrite: bool, resume: bool = False) -> Iterator[WorkFolder]:
    """Lock OUT and yield its work folder; at the end, remove the work folder unless it holds finished work.

    Of several ranks the first locks and removes.

    Yields:
        The work folder. Finished work stays after every exception but a NumericalError, which would come again.

    Raises:
        RequestError: another process is at work in OUT, or OUT or the work folder is not ours.
        StorageError: the disk fails.
    """
    work = WorkFolder(out, overwrite)
    if not distributed.is_first():
        distributed.wait()
        yield work
        return
    descriptor = _claim(work)
    kept = False
    try:
        _settle(work)
        if os.path.lexists(out) and not (overwrite or resume):
            raise RequestError(f"{out}: exists already; choose another folder, or pass --overwrite")
        distributed.wait()
        yield work
    except BaseException as error:
        kept = work.is_worth_keeping and not isinstance(error, NumericalError)
        if isinstance(error, StorageError) and (work.progress.is_file() or work.training.is_dir()):
            raise StorageError(f"{error}; what is finished stays: a stage goes on with --resume, a run by itself") from error
        raise
    finally:
        if not kept:
            _remove_work(work)
        os.close(descriptor)


def settle(out: Path) -> None:
    """Bring order into what a killed process left beside OUT; finished work that is not in OUT yet stays."""
    work = WorkFolder(out)
    with _claimed(work) as is_there:
        if is_there:
            _settle(work)
            if not work.is_worth_keeping:
                _remove_work(work)


def discard(out: Path) -> None:
    """Remove the work folder of OUT with all that is in it, if there is one; the lock of another process is respected."""
    work = WorkFolder(out)
    with _claimed(work) as is_there:
        if is_there:
            _settle(work)
            _remove_work(work)


def remove(out: Path) -> None:
    """Remove a finished folder, which the caller knows to be ours, and its work folder: OUT is whole or gone at any moment.

    Raises:
        RequestError: another process is at work in OUT, or the work folder is not ours.
        StorageError: the disk fails; OUT is then as it was.
    """
    work = WorkFolder(out)
    descriptor = _claim(work)
    try:
        _settle(work)
        with storing(out):
            _remove(work.old)
            out.rename(work.old)
        _remove_work(work)
    finally:
        os.close(descriptor)


def start_result(work: WorkFolder) -> Path:
    """Forget an earlier unfinished result and make the new, empty one; raises StorageError if the disk fails."""
    with storing(work.result):
        work.progress.unlink(missing_ok=True)
        if work.result.exists():
            shutil.rmtree(work.result)
        work.result.mkdir()
    return work.result


def commit(work: WorkFolder) -> None:
    """Give the complete result, with its manifest, the name OUT.

    Raises:
        StorageError: the disk fails, or OUT appeared while the work was done; the result stays in the work folder.
    """
    for path in (*work.result.rglob("*"), work.result):
        sync(path)
    write_whole_json(work.commit_record, {"manifest": manifest_digest(work.result)})
    _give_name(work)
    try:
        sync(work.out.parent)
        sync(work.path)
    except StorageError as error:
        _warn(f"{work.out}: is whole, but the disk did not confirm its name: {error}")


@contextlib.contextmanager
def whole_folder(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder to write into, manifest included; it becomes OUT at the end, and is removed after an exception."""
    with held(out, overwrite) as work:
        yield start_result(work)
        commit(work)


def _claim(work: WorkFolder) -> int:
    """Make the work folder and lock it; returns the lock's descriptor."""
    while True:
        check_work_is_ours(work)
        with storing(work.path):
            work.path.mkdir(parents=True, exist_ok=True)
        try:
            return acquire(work.lock, work.out)
        except FileNotFoundError:  # its holder has just removed the folder
            continue
        except StorageError:
            with contextlib.suppress(OSError):
                work.path.rmdir()
            raise


@contextlib.contextmanager
def _claimed(work: WorkFolder) -> Iterator[bool]:
    """Lock what a killed process left beside OUT; yields whether it left anything but an empty folder, which is removed."""
    if not work.lock.is_file():
        with contextlib.suppress(OSError):  # there is none, or it is not empty and not ours
            work.path.rmdir()
        yield False
        return
    descriptor = _claim(work)
    try:
        yield True
    finally:
        os.close(descriptor)


def _settle(work: WorkFolder) -> None:
    """Undo or complete what a killed process was about to do."""
    with storing(work.path):
        if work.replaced.exists() and not os.path.lexists(work.out):
            work.replaced.rename(work.out)
            sync(work.out.parent)
        if work.is_committed:
            _empty(work)
        work.commit_record.unlink(missing_ok=True)
        _remove(work.path / "scratch")


def _give_name(work: WorkFolder) -> None:
    """One step from the old OUT, or none, to the new one."""
    out = work.out
    try:
        if not (work.overwrite and os.path.lexists(out)):
            work.result.rename(out)  # never replaces anything but an empty folder
            return
        check_replaceable(out)
        if exchange(work.result, out):
            return
        out.rename(work.replaced)
        try:
            work.result.rename(out)
        except OSError:
            work.replaced.rename(out)
            raise
    except (OSError, RequestError) as error:
        reason = error if isinstance(error, RequestError) else error.strerror
        raise StorageError(
            f"{out}: the finished result cannot get this name ({reason}); it is in {work.result}: move it to where you want it"
        ) from error


def _remove_work(work: WorkFolder) -> None:
    """Remove the work folder; what cannot be removed is said, and is no failure."""
    try:
        _empty(work)
        if [path for path in work.path.iterdir() if path != work.lock]:
            return
        work.lock.unlink(missing_ok=True)
    except OSError as error:
        _warn(f"{work.path}: cannot be removed ({error.strerror}); the next command on {work.out} tries again")
        return
    with contextlib.suppress(OSError):  # another process may have taken the folder since this one gave the lock up
        work.path.rmdir()


def _empty(work: WorkFolder) -> None:
    """Remove all but the lock, the commit record last; an old OUT is removed only if it is ours."""
    for path in (work.result, work.replaced):
        if not path.exists() or (path == work.result and not work.is_committed):
            continue
        if work.is_committed and is_ours(path):
            _forget(path, work.old)
        else:
            _warn(f"{path}: was under the name of the result and is not ours; move it to where it belongs")
            return
    for path in sorted(work.path.iterdir(), key=lambda each: each == work.commit_record):
        if path != work.lock:
            _forget(path, work.old)


def _forget(path: Path, old: Path) -> None:
    """Remove a file, or a folder that is renamed first: half removed under its own name, it would be taken for what it was."""
    if path != old and path.is_dir() and not path.is_symlink():
        _remove(old)
        path.rename(old)
        path = old
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _warn(message: str) -> None:
    warnings.warn(message, StorageWarning, stacklevel=2)


def open_training(work: WorkFolder, fingerprint: str, resume: bool) -> Path:
    """Go on with the intermediate results of an interrupted run of the same request, or begin without any.

    Returns:
        Their folder.

    Raises:
        RequestError: they are to be resumed, and are another request's.
        StorageError: the disk fails.
    """
    folder = work.training
    file = folder / REQUEST
    if resume and file.is_file():
        if read_json(file).get("fingerprint") != fingerprint:
            raise RequestError(f"{folder}: left by a run with other inputs or settings; repeat those, or drop --resume")
        return folder
    with storing(folder):
        file.unlink(missing_ok=True)  # first, so that a half removed folder is nobody's
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
    write_whole_json(file, {"fingerprint": fingerprint})
    return folder
