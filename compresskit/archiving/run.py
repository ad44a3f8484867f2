"""The pack stage at work."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from compresskit.archiving.request import PackOptions
from compresskit.checkpoint import source
from compresskit.checkpoint.file_out import check_file_out
from compresskit.checkpoint.manifest import recorded_hashes
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.results import stage_result, time_and_memory
from compresskit.checkpoint.whole_files import whole_file
from compresskit.checkpoint.work_folder import check_space
from compresskit.formats.archive.container import MAGIC, by_kind
from compresskit.formats.archive.packing import check_outside, check_recorded, digests_of, files_of, pack_files, planned_sections
from compresskit.formats.archive.threads import threads_to_use
from compresskit.machine.progress import ProgressBars


def pack(source_name: str, out: Path, options: PackOptions, quiet: bool = True) -> dict[str, Any]:
    """Pack a folder of weights, with all that is in it, into the file OUT.

    Returns:
        The dictionary that `--json` prints: sizes in bytes, times in seconds.

    Raises:
        CompresskitError: see errors.py for the kinds; after any error OUT is as it was.
    """
    started = time.monotonic()
    check_file_out(out, options.ending, MAGIC, options.overwrite)
    folder = source.resolve(source_name)
    files = files_of(folder)
    check_outside(out, folder)
    total = sum(file.stamp.bytes for file in files)
    check_space(out, total)
    sections, threads = planned_sections(files), threads_to_use(options.threads)
    digests = digests_of(files, threads)
    if options.verify:
        check_recorded(folder, recorded_hashes(read_manifest(folder) or {}), digests)
    with whole_file(out) as path, ProgressBars(quiet) as bars:
        archive = pack_files(files, sections, digests, path, threads, bars.of("packing"))
    size = out.stat().st_size
    settings = {"method": "pack", **options.model_dump(include={"threads"})}
    facts = {
        "ratio": size / total if total else 1.0,
        "files": len(files),
        "digest": archive.digest,
        "kinds": by_kind(archive.sections),
    }
    return stage_result("pack", settings, out, folder, (None, total), (None, size)) | facts | time_and_memory(started)
