"""Parts of a file by position, read into memory that the caller provides.

Plain reads, not mapped pages: a file that is cut short while it is read gives an error, where a mapped one ends the process
with SIGBUS, and what is read counts as the process's own memory, as `plan` states it.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Stamp(NamedTuple):
    """What tells that a file has changed."""

    device: int
    number: int
    """Of the file on its device."""
    bytes: int
    changed: int
    """When its content changed, in nanoseconds."""

    def is_another(self, other: Stamp) -> bool:
        """Whether these are two files. Some network file systems renumber a file that stays the same, which keeps its time."""
        return (self.device, self.number) != (other.device, other.number) and self.changed != other.changed


def stamp_of(file: int) -> Stamp:
    """The stamp of an open file."""
    found = os.fstat(file)
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def fill(file: int, start: int, data: memoryview) -> None:
    """Fill `data`, (bytes,) of one byte each, with an open file's bytes from `start` on.

    Raises:
        OSError: the disk fails.
        ValueError: the file ends before.
    """
    filled = 0
    while filled < len(data):
        count = os.preadv(file, [data[filled:]], start + filled)
        if count == 0:
            raise ValueError(f"it ends at byte {start + filled:,}, {len(data) - filled:,} bytes too early")
        filled += count
