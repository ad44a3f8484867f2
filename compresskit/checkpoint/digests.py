"""SHA-256 of weight files, in threads beside the work: hashlib releases Python's lock.

What goes wrong in a thread is raised where the digest is asked for. The threads end with the process, so an interrupted
command does not wait for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, MutableMapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

CHUNK_BYTES = 1 << 22
Digests = MutableMapping[Path, "Future[str]"]
"""What is being computed, by file."""


def sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    return _digest(path, Future()) or ""


def begin(digests: Digests, paths: Iterable[Path]) -> None:
    """Compute the SHA-256 of files in one thread, one after the other; those that are known or under way are left out."""
    begun: dict[Path, Future[str]] = {path: Future() for path in paths if path not in digests}
    digests.update(begun)
    if begun:
        # No thread of a pool: Python waits for these at its end.
        Thread(target=_compute, args=(begun,), name="sha256", daemon=True).start()


def forget(digests: Digests, path: Path) -> None:
    """Drop the digest of a file that is being changed, known or under way."""
    found = digests.pop(path, None)
    if found is not None:
        found.cancel()


@contextmanager
def beside(stores: Iterable[tuple[Digests, list[Path]]]) -> Iterator[None]:
    """Hash files, (where their digests go, the files) each, beside what is done in this context, and no longer than that."""
    begun = list(stores)
    for digests, paths in begun:
        begin(digests, paths)
    try:
        yield
    finally:
        for digests, paths in begun:
            for path in paths:
                if not digests[path].done():
                    forget(digests, path)


def _compute(begun: dict[Path, Future[str]]) -> None:
    for path, found in begun.items():
        try:
            digest = _digest(path, found)
        except Exception as error:  # raised where the digest is asked for
            if found.set_running_or_notify_cancel():
                found.set_exception(error)
            continue
        if digest is not None and found.set_running_or_notify_cancel():
            found.set_result(digest)


def _digest(path: Path, wanted: Future[str]) -> str | None:
    """SHA-256 of a file, None as soon as it is not wanted any more."""
    digest, data = hashlib.sha256(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(data):
            if wanted.cancelled():
                return None
            digest.update(data[:count])
    return digest.hexdigest()
