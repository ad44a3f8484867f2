"""Training checkpoints, and finished spans of blocks: which of them are complete."""

from __future__ import annotations

from pathlib import Path

from compresskit.checkpoint.reader import sha256
from compresskit.checkpoint.small_files import read_json
from compresskit.checkpoint.whole_files import NEW
from compresskit.errors import CheckpointError

COMPLETE = "complete.json"
"""Record of the SHA-256 of a complete checkpoint's files."""
CHECKPOINTS = "checkpoint-*"


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were saved, None if there is none."""
    found = [path for path in folder.glob(CHECKPOINTS) if (path / COMPLETE).is_file()]
    newest_first = sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((path for path in newest_first if is_whole(path)), None)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files, by path inside it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (COMPLETE, COMPLETE + NEW))
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def is_whole(folder: Path) -> bool:
    """Whether a folder's files are as its record says."""
    try:
        return read_json(folder / COMPLETE) == hashes(folder)
    except CheckpointError:  # the record itself is damaged, or not there yet
        return False
