"""The user's cache: where what is costly to make again is kept. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path

from compresskit.errors import RequestError


def cache_folder() -> Path:
    """`$COMPRESSKIT_CACHE`, else `$XDG_CACHE_HOME/compresskit`, else `~/.cache/compresskit`; it need not exist."""
    if own := os.environ.get("COMPRESSKIT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "compresskit"
    return Path.home() / ".cache" / "compresskit"


def writable_cache(room: str) -> Path:
    """The folder `room` inside the cache, made if need be; RequestError where it cannot be written to."""
    folder = cache_folder() / room
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be made ({error.strerror}); set COMPRESSKIT_CACHE to a writable folder") from error
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{folder}: cannot be written to; set COMPRESSKIT_CACHE to a writable folder")
    return folder
