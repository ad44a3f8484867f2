"""Exchange two names in one step, where the system can: renameat2 on Linux, renamex_np on macOS."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
"""Of linux/fs.h."""
RENAME_SWAP = 2
"""Of macOS's stdio.h."""
CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What systems and file systems without the call answer."""


def exchange(first: Path, second: Path) -> bool:
    """Exchange two names of one file system, so that no moment is without either.

    Returns:
        False if the system or the file system cannot do it; nothing has changed then.

    Raises:
        OSError: the exchange failed; nothing has changed.
    """
    call = _call()
    if call is None:
        return False
    if call(os.fsencode(first), os.fsencode(second)) == 0:
        return True
    number = ctypes.get_errno()
    if number in CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(first), None, str(second))


def _call() -> Callable[[bytes, bytes], int] | None:
    """The system's function of two paths; None if there is none."""
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if sys.platform == "darwin":
            swap = library.renamex_np
            return lambda first, second: int(swap(first, second, RENAME_SWAP))
        rename = library.renameat2
    except (OSError, TypeError, AttributeError):  # no C library to ask, or an old one
        return None
    return lambda first, second: int(rename(AT_FDCWD, first, AT_FDCWD, second, RENAME_EXCHANGE))
