"""The user's cache for results that are expensive to recompute."""

from __future__ import annotations

import os
from pathlib import Path

from compresskit.errors import RequestError


def cache_folder() -> Path:
    """`$COMPRESSKIT_CACHE`, else `$XDG_CACHE_HOME/compresskit`, else `~/.cache/compresskit`; it may not exist."""
    if own := os.environ.get("COMPRESSKIT_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "compresskit"
    return Path.home() / ".cache" / "compresskit"


def writable_cache(room: str) -> Path:
    """Return the folder `room` inside the cache, creating it if needed; raises RequestError if it is not writable."""
    folder = cache_folder() / room
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: cannot be made ({error.strerror}); set COMPRESSKIT_CACHE to a writable folder") from error
    if not os.access(folder, os.W_OK):
        raise RequestError(f"{folder}: cannot be written to; set COMPRESSKIT_CACHE to a writable folder")
    return folder
