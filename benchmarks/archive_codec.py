"""Size and speed of `pack` on a folder, beside zstd -19 of its safetensors files.

    python benchmarks/archive_codec.py FOLDER [--rounds 3] [--skip-zstd]

One thread; CPU seconds, the best of the rounds, which other work on the machine disturbs less than the clock. Speeds are in MB
of the folder a CPU second: `decode` from the archive's bytes in memory to the folder's, checksums included; `expand` with the
files written and their SHA-256 compared. Prints a JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from compresskit.formats.archive.coding import zstd
from compresskit.formats.archive.container import Archive, by_kind, open_archive
from compresskit.formats.archive.packing import digests_of, files_of, pack_files, planned_sections
from compresskit.formats.archive.restoring import restore
from compresskit.formats.archive.sections import decode


def silent(done: int, total: int) -> None:
    assert done <= total


def timed(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def packed(folder: Path, path: Path) -> None:
    files = files_of(folder)
    pack_files(files, planned_sections(files), digests_of(files, 1), path, 1, silent)


def decoded(archive: Archive) -> None:
    data = archive.path.read_bytes()
    for section, start in zip(archive.sections, archive.starts(), strict=True):
        decode(section, data[start : start + section.stored])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-zstd", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "a.ckz"
        pack_seconds = timed(lambda: packed(arguments.folder, path))
        archive = open_archive(path)
        expanded = []
        for number in range(arguments.rounds):
            out = Path(name) / str(number)
            out.mkdir()
            expanded.append(timed(partial(restore, archive, out, 1, silent)))
        decode_seconds = min(timed(lambda: decoded(archive)) for _ in range(arguments.rounds))
        weights = {number for number, file in enumerate(archive.files) if file.name.endswith(".safetensors")}
        plain = sum(archive.files[number].bytes for number in weights)
        stored = sum(section.stored for section in archive.sections if section.file in weights)
        found: dict[str, Any] = {
            "folder": arguments.folder.name, "bytes": archive.bytes, "archive": path.stat().st_size,
            "safetensors": plain, "stored": stored, "saved": round(1 - stored / plain, 4),
            "pack_MB_per_s": round(archive.bytes / pack_seconds / 1e6),
            "expand_MB_per_s": round(archive.bytes / min(expanded) / 1e6),
            "decode_MB_per_s": round(archive.bytes / decode_seconds / 1e6), "kinds": by_kind(archive.sections),
        }  # fmt: skip
        if not arguments.skip_zstd:
            sizes = [
                len(zstd.compress((arguments.folder / archive.files[number].name).read_bytes(), level=19)) for number in weights
            ]
            found["zstd_19_saved"] = round(1 - sum(sizes) / plain, 4)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
