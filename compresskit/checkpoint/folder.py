"""Give a finished folder its final name, whole or not at all: for outputs that are no checkpoint. Loads no torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from compresskit.checkpoint.writer import partial_folder, sync


def start_folder(out: Path) -> Path:
    """An empty folder in which the output is made."""
    partial = partial_folder(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def commit_folder(partial: Path, out: Path) -> None:
    """Sync what is in the folder and rename it, replacing an older one."""
    for path in (*partial.rglob("*"), partial):
        sync(path)
    replaced = out.with_name(out.name + ".replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """A text file that is either as it was or as it shall be."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)
