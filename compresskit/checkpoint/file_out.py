"""What OUT may be where a stage writes one file."""

from __future__ import annotations

import os
from pathlib import Path

from compresskit.checkpoint.work_folder import check_name
from compresskit.errors import RequestError


def check_file_out(out: Path, ending: str, magic: bytes, overwrite: bool) -> None:
    """Check the name of the output file before anything is read; such files begin with `magic`.

    Raises:
        RequestError: it has another ending, exists (unless `overwrite`) or is something else, or its folder cannot be written.
    """
    check_name(out)
    if out.suffix != ending:
        raise RequestError(f"{out}: is to be a file, whose name ends with {ending}; write for example {out}{ending}")
    if os.path.lexists(out):
        if not overwrite:
            raise RequestError(f"{out}: exists already; choose another file, or pass --overwrite")
        if out.is_symlink() or not out.is_file():
            raise RequestError(f"{out}: is no file, so it is not replaced; move it away, or choose another OUT")
        with out.open("rb") as file:
            found = file.read(len(magic))
        if found != magic:
            raise RequestError(f"{out}: is no {ending} file, so it is not replaced; move it away, or choose another OUT")
    folder = out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise RequestError(f"{folder}: is no folder that can be written to; make it first, or choose another OUT")
