"""`compresskit.json`: settings, inputs and results of a stage. Each manifest contains its predecessor's."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from compresskit import __version__
from compresskit.checkpoint.reader import Checkpoint, sha256

NAME = "compresskit.json"
FORMAT_VERSION = 1


def manifest(
    stage: str, settings: dict[str, Any], source: Checkpoint, outputs: dict[str, str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Build the manifest of one finished stage.

    `settings` includes the method's name. `outputs` maps weight files to SHA-256. `facts` is the method's per-block report.

    Returns:
        The content of `compresskit.json`, including the source's own manifest.
    """
    return {
        "format_version": FORMAT_VERSION,
        "tool": "compresskit",
        "version": __version__,
        "stage": stage,
        "method": settings["method"],
        "settings": settings,
        "inputs": {"folder": source.folder.name, "sha256": source.hashes},
        "outputs": {"sha256": outputs},
        "facts": facts,
        "source": source.manifest,
    }


def chain(found: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Manifests from the newest to the first compression of the dense model."""
    links = []
    while found is not None:
        links.append(found)
        found = found.get("source")
    return links


def fingerprint(*parts: Any) -> str:
    """SHA-256 of a request: settings, input hashes, tool version."""
    text = json.dumps([__version__, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def changed_files(folder: Path, recorded: dict[str, Any]) -> list[str]:
    """Weight files that differ from the manifest."""
    hashes: dict[str, str] = recorded.get("outputs", {}).get("sha256", {})
    return [name for name, digest in hashes.items() if not (folder / name).is_file() or sha256(folder / name) != digest]
