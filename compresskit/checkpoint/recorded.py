"""Read the manifest of a folder, `compresskit.json`, and check what its readers follow: the chain, and the hashes by file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import inside, read_json, shown
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import CheckpointError


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a folder, and check what a chain of manifests is followed by.

    Returns:
        The content of compresskit.json, None if there is none.

    Raises:
        CheckpointError: the file is no manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found: Any = read_json(path)
    link = found
    while link is not None:
        if not isinstance(link, dict):
            raise CheckpointError(f"{path}: holds {shown(link)} for a manifest; restore the file from its source")
        _hashes(link, "inputs", path)  # a merge names the paths of its sources here
        for name in _hashes(link, "outputs", path):
            inside(folder, name, path, subfolders=True)
        link = link.get("source")
    return dict(found)


def _hashes(link: dict[str, Any], key: str, path: Path) -> dict[str, str]:
    """SHA-256 by file that a manifest states under a key; raises CheckpointError if it is of another shape."""
    part = link.get(key) or {}
    hashes = part.get("sha256", {}) if isinstance(part, dict) else None
    if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
        raise CheckpointError(f"{path}: states no SHA-256 by file under {key!r}; restore the file from its source")
    return hashes
