"""Copy the small files beside the weights from SOURCE to OUT: what a link in a folder of a stranger points to stays where it is.

A link is followed to files of its own folder only, or, in a snapshot of the Hub's cache, to that repository's `blobs`.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from compresskit.checkpoint.whole_files import storing
from compresskit.errors import CheckpointError

SIDE_FILES = (
    "generation_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "LICENSE", "LICENSE.txt",
    "NOTICE", "USE_POLICY.md", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "chat_template.json",
)  # fmt: skip
"""Files that stock tools read in addition to the weights; copied byte for byte."""
CHUNK_BYTES = 1 << 20
OWN_COPY = "replace it by a copy of the file"


def side_files(source: Path, names: tuple[str, ...] = SIDE_FILES) -> dict[str, Path]:
    """Find the side files of a folder.

    Returns:
        By name, the file that holds the content: the file itself, or the target of an allowed link.

    Raises:
        CheckpointError: a link leads out of the folder or nowhere, or the name belongs to something other than a file.
    """
    return {name: _checked(source, name) for name in names if os.path.lexists(source / name)}


def _checked(source: Path, name: str) -> Path:
    path = source / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link to {path.readlink()}, which cannot be read; {OWN_COPY}") from error
        raise _unreadable(path, error) from error
    if not any(target.is_relative_to(folder) for folder in _allowed(source)):
        raise CheckpointError(f"{path}: is a link to {target}, outside {source}; {OWN_COPY}")
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise CheckpointError(f"{path}: {target} is {what}, expected a file; {OWN_COPY}")
    return target


def _allowed(source: Path) -> list[Path]:
    """Return the folders in which the content of a side file may lie."""
    folder = source.resolve()
    repository = folder.parent.parent
    is_snapshot = folder.parent.name == "snapshots" and repository.name.startswith("models--")
    return [folder, repository / "blobs"] if is_snapshot else [folder]


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    reason = getattr(error, "strerror", None) or str(error)
    return CheckpointError(f"{path}: cannot be read ({reason}); check its permissions, or restore the file from its source")


def copy_side_files(source: Path, target_folder: Path, names: tuple[str, ...] = SIDE_FILES) -> None:
    """Copy the side files of a folder byte for byte, with the process's own permissions.

    A file or a link that stands under the name in `target_folder` is replaced.

    Raises:
        CheckpointError: a file of the source cannot be read, or `side_files` refuses it.
        StorageError: a copy cannot be written.
    """
    for name, path in side_files(source, names).items():
        _copy(path, target_folder / name)


def _copy(path: Path, target: Path) -> None:
    try:
        # A name may have changed hands since it was looked at: no link is followed, no pipe waited for.
        with open(path, "rb", opener=_open_unlinked) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError(f"{path}: is no file any more; {OWN_COPY}")
            with storing(target):
                target.unlink(missing_ok=True)
                copy = target.open("xb")
            with copy:
                while chunk := file.read(CHUNK_BYTES):
                    with storing(target):
                        copy.write(chunk)
                with storing(target):
                    copy.close()
    except OSError as error:
        raise _unreadable(path, error) from error


def _open_unlinked(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
