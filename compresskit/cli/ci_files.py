"""The files that `run` writes for a CI service: JUnit XML, and the Markdown summary of a job."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from compresskit.checkpoint.whole_files import storing, write_whole
from compresskit.errors import RequestError, StorageError


class CiFile(NamedTuple):
    """A file that is asked for."""

    asked_by: str
    """The flag, or the variable of the environment."""
    path: Path

    def check(self) -> None:
        """Refuse a file that cannot be written, before the work."""
        named = f"{self.asked_by} {self.path}"
        if self.path.is_dir():
            raise RequestError(f"{named}: is a folder; give a file in it")
        target = self.path.resolve()
        existing = next(parent for parent in target.parents if parent.exists())
        if not existing.is_dir():
            raise RequestError(f"{named}: {existing} is a file, not a folder; choose another path")
        replaceable = target.is_file() or not target.exists()
        if (replaceable and not os.access(existing, os.W_OK | os.X_OK)) or (target.exists() and not os.access(target, os.W_OK)):
            raise RequestError(f"{named}: cannot be written to; choose another path, or change its permissions")

    def replace(self, text: str) -> None:
        """Write the file whole or not at all; a device or a pipe takes the text as it is."""
        target = self._with_its_folder()
        if target.exists() and not target.is_file():
            self.append(text)
        else:
            write_whole(target, text)

    def append(self, text: str) -> None:
        """Add text to the end, in one piece, so that other processes can add to the same file."""
        target, data = self._with_its_folder(), text.encode("utf-8")
        with storing(target):
            descriptor = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                written = os.write(descriptor, data)
            finally:
                os.close(descriptor)
        if written < len(data):
            raise StorageError(f"{target}: took {written} of {len(data)} bytes; free some space")

    def _with_its_folder(self) -> Path:
        target = self.path.resolve()
        with storing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
        return target


class CiFiles(NamedTuple):
    """What one run shall write."""

    junit: CiFile | None
    summaries: list[CiFile]


def asked_for(junit: Path | None, summary: Path | None) -> CiFiles:
    """The files that the flags and the environment ask for; raises RequestError where one cannot be written."""
    from compresskit.recipe.verdict import SUMMARY_VARIABLE

    given = os.environ.get(SUMMARY_VARIABLE)
    found = {path: CiFile(f"${SUMMARY_VARIABLE}", path) for path in ([Path(given)] if given else [])}
    found |= {path: CiFile("--summary", path) for path in ([summary] if summary else [])}
    files = CiFiles(CiFile("--junit", junit) if junit else None, list(found.values()))
    for each in (*([files.junit] if files.junit else []), *files.summaries):
        each.check()
    return files


def write(files: CiFiles, result: dict[str, Any]) -> None:
    """Write them for a finished run; raises StorageError, which names the file, where the disk fails."""
    from compresskit.recipe import verdict

    if files.junit:
        files.junit.replace(verdict.junit(result))
    for each in files.summaries:
        each.append(verdict.markdown(result) + "\n")
