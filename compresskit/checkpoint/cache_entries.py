"""What lies in the user's cache, and its removal; every entry is made again when it is next asked for.

    demo         a folder           the converted demo model
    calibration  HASH.safetensors   text sampled from a model, as tokens
    structures   HASH.json          the derived structure of a model

Nothing else in the folder is listed or removed. A run reads sampled text and structures once, at its start, so that their
removal disturbs none; the demo model stays while a process is at work on it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from compresskit.checkpoint import demo
from compresskit.checkpoint.cache import cache_folder
from compresskit.checkpoint.whole_files import storing
from compresskit.errors import RequestError, near_miss

SECONDS_PER_DAY = 86_400
HASHED = {"calibration": re.compile(r"[0-9a-f]{64}\.safetensors"), "structures": re.compile(r"[0-9a-f]{64}\.json")}
"""Names of the files of a kind."""
KINDS = ("demo", *HASHED)


@dataclass(frozen=True)
class Entry:
    """One thing in the cache."""

    kind: str
    path: Path
    bytes: int
    days: float
    """Since it was made, or its file was last written."""


def entries(kinds: Collection[str] = (), older_than: float = 0.0) -> list[Entry]:
    """List the cache, oldest first. `kinds`: all if empty; `older_than`: days.

    Returns:
        The entries of these kinds and of at least this age.

    Raises:
        RequestError: there is no such kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise RequestError(f"--kind {kind}: the cache has {', '.join(KINDS)}.{near_miss(kind, KINDS)}")
    found = [entry for kind in (kinds or KINDS) for entry in _of_kind(kind)]
    return sorted((entry for entry in found if entry.days >= older_than), key=lambda entry: -entry.days)


def _of_kind(kind: str) -> list[Entry]:
    room = cache_folder() / kind
    if not room.is_dir():
        return []
    if kind == "demo":
        folder = room / demo.NAME
        record = folder / demo.RECORD
        return [_entry(kind, folder, record)] if record.is_file() and not folder.is_symlink() else []
    return [_entry(kind, path, path) for path in room.iterdir() if HASHED[kind].fullmatch(path.name) and path.is_file()]


def _entry(kind: str, path: Path, dated: Path) -> Entry:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    age = time.time() - dated.stat().st_mtime
    return Entry(kind, path, sum(each.stat().st_size for each in files), max(age, 0.0) / SECONDS_PER_DAY)


def remove(entry: Entry) -> str | None:
    """Remove one entry; another process may have removed it already.

    Returns:
        Why it was kept; None if it is gone.

    Raises:
        StorageError: it cannot be removed.
    """
    with storing(entry.path):
        if entry.kind == "demo":
            return demo.remove_demo()
        entry.path.unlink(missing_ok=True)
        return None
