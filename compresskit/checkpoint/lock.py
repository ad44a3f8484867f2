"""A lock on a file that names its holder. The kernel frees it when the holder's process ends, so a dead holder blocks nobody.

The file may be removed by its holder, and only by its holder; see `acquire`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from compresskit.errors import RequestError, StorageError, StorageWarning

PATIENCE_SECONDS = 0.3
"""Time for a holder that is just leaving, or looking."""
PAUSE_SECONDS = 0.01
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer."""
MOST_HOLDER_BYTES = 1000


@contextlib.contextmanager
def locked(path: Path, place: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays; raises RequestError if another process is at work in `place`."""
    descriptor = acquire(path, place)
    try:
        yield
    finally:
        os.close(descriptor)


def acquire(path: Path, place: Path, make: bool = True) -> int:
    """Lock the file `path`, made if needed and allowed, and write this process's name into it; folders are not made.

    A holder may remove the file. One that opened it just before holds a lock on no name, so the name is compared afterwards.

    Returns:
        The open descriptor; closing it frees the lock.

    Raises:
        RequestError: another process holds the lock; the message names it, and `place` where it is at work.
        StorageError: the file cannot be made or written.
        FileNotFoundError: the folder is gone, or the file where it is not to be made.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        descriptor = _open(path, os.O_CREAT if make else 0)
        try:
            if _try_lock(descriptor, path) and _is_named(descriptor, path):
                _write_holder(descriptor, path)
                return descriptor
            if time.monotonic() > deadline:
                raise RequestError(f"{place}: {_holder(descriptor)} is at work in it; wait for it, or choose another OUT")
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        time.sleep(PAUSE_SECONDS)


def check_unlocked(path: Path, place: Path) -> None:
    """Raise RequestError if another process holds the lock file `path`; holds it for a moment itself."""
    with contextlib.suppress(FileNotFoundError):  # nobody is there, or the holder left just now
        os.close(acquire(path, place, make=False))


def _open(path: Path, make: int) -> int:
    try:
        return os.open(path, os.O_RDWR | make | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: cannot be opened ({error.strerror}); free some space, or choose another OUT") from error


def _try_lock(descriptor: int, path: Path) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise StorageError(f"{path}: cannot be locked ({error.strerror}); choose another OUT") from error
        warnings.warn(f"{path}: this file system has no locks; run one command at a time on it", StorageWarning, stacklevel=3)
    return True


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int, path: Path) -> None:
    text = json.dumps({"tool": "compresskit", "process": os.getpid(), "host": socket.gethostname()}).encode()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()
        raise StorageError(f"{path}: cannot be written ({error.strerror}); free some space, or choose another OUT") from error


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, MOST_HOLDER_BYTES, 0))
        return f"process {int(found['process'])} on {str(found['host'])[:100]!s}"
    except (ValueError, KeyError, TypeError):  # the holder is about to write its name
        return "another process"
