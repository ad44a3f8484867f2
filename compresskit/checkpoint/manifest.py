"""`compresskit.json`: settings, inputs and results of a stage. Each manifest contains its predecessor's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compresskit import __version__
from compresskit.checkpoint.hub import origin
from compresskit.checkpoint.kinds import OBJECT, TEXT, Kind, Stated
from compresskit.checkpoint.reader import Checkpoint, sha256
from compresskit.checkpoint.recorded import read_manifest
from compresskit.checkpoint.small_files import inside
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import CheckpointError, NumericalError

FORMAT_VERSION = 1
FINISHED: dict[str, Kind] = {"stage": TEXT.always, "method": TEXT.always, "settings": OBJECT.always, "facts": OBJECT}
"""Of a manifest from which a stage's result is known again."""


def manifest(
    stage: str, settings: dict[str, Any], source: Checkpoint, outputs: dict[str, str], facts: dict[str, Any]
) -> dict[str, Any]:
    """Build the manifest of one finished stage.

    `settings` includes the method's name. `outputs` maps weight files to SHA-256. `facts` is the method's per-block report.

    Returns:
        The content of `compresskit.json`, including the source's own manifest.
    """
    hub = origin(source.folder)
    return {
        "format_version": FORMAT_VERSION,
        "tool": "compresskit",
        "version": __version__,
        "stage": stage,
        "method": settings["method"],
        "settings": settings,
        "inputs": {"folder": source.folder.name, "sha256": source.hashes} | ({"hub": hub} if hub else {}),
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


def check_unchanged(store: Checkpoint) -> None:
    """Compare the weight files of an opened folder with the manifest that lists them, in the folder or the one above.

    Raises:
        CheckpointError: a file's SHA-256 differs from the recorded one.
    """
    is_part = not (store.folder / MANIFEST).is_file()  # an adapter's folder beside the weights that it repairs
    folder = store.folder.absolute().parent if is_part else store.folder
    recorded = recorded_hashes(read_manifest(folder) or {})
    for file in store.files:
        expected = recorded.get(f"{store.folder.name}/{file.name}" if is_part else file.name)
        if expected is not None and store.hashes[file.name] != expected:
            raise CheckpointError(
                f"{file}: SHA-256 is {store.hashes[file.name]}, {folder / MANIFEST} recorded {expected}; use an intact copy, "
                "or pass --no-verify if you changed it"
            )


def verified_hashes(stores: Sequence[Checkpoint], verify: bool) -> list[dict[str, str]]:
    """SHA-256 of opened folders' weight files, by name; raises CheckpointError if `verify` and a manifest recorded another."""
    for store in stores if verify else ():
        check_unchanged(store)
    return [store.hashes for store in stores]


@contextmanager
def damage_named(verify: Callable[[], object]) -> Iterator[None]:
    """Where the work fails on what it read, `verify` the weight files first: it names the damaged one, if that is the cause."""
    try:
        yield
    except (CheckpointError, NumericalError):
        verify()
        raise


def recorded_hashes(recorded: dict[str, Any]) -> dict[str, str]:
    """SHA-256 by file name that a manifest, as `read_manifest` gives it, states; empty where it states none."""
    hashes: dict[str, str] = (recorded.get("outputs") or {}).get("sha256", {})
    return hashes


def changed_files(folder: Path, recorded: dict[str, Any]) -> list[str]:
    """Weight files that differ from the manifest."""
    changed = []
    for name, digest in recorded_hashes(recorded).items():
        file = inside(folder, name, folder / MANIFEST, subfolders=True)
        if not file.is_file() or sha256(file) != digest:
            changed.append(name)
    return changed


def finished_result(out: Path) -> dict[str, Any]:
    """Read from the folder of a finished stage what is known of its result.

    Returns:
        The result's keys; time and memory are None, which no folder holds.

    Raises:
        CheckpointError: its manifest does not say what a stage's does.
    """
    made = read_manifest(out) or {}
    Stated(out / MANIFEST).check(made, FINISHED)
    after = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    result = {"stage": made["stage"], "method": made["method"], "output": str(out)}
    facts: dict[str, Any] = made.get("facts") or {}
    settings = {"method": made["method"]} | made["settings"]
    return facts | result | {"settings": settings, "bytes_after": after, "seconds": None, "peak_memory_bytes": None}
