"""A small output folder that appears whole or not at all, for what is no model checkpoint: adapters, task vectors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compresskit.checkpoint.writer import FILE_MODE, partial_folder, sync


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield the folder to write into; it gets its final name at the end, and goes where anything was raised."""
    partial = partial_folder(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    replaced = out.with_name(out.name + ".replaced")
    if out.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        out.rename(replaced)
    partial.rename(out)
    sync(out.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def copy_files(names: tuple[str, ...], source: Path, target: Path) -> None:
    """Copy those of the files that there are, byte for byte."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
            (target / name).chmod(FILE_MODE)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a manifest."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    path.chmod(FILE_MODE)
