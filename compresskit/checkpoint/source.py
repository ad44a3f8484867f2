"""Resolve SOURCE to a checkpoint folder: a folder, a Hub id, `demo:NAME`, or `-` for standard input."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from compresskit.checkpoint.small_files import first_line, shown
from compresskit.errors import CheckpointError, RequestError

DEMO = "demo:smollm2-135m"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*", "README.md", "*.py"]


def resolve(source: str) -> Path:
    """Resolve a SOURCE argument to a checkpoint folder, downloading it if needed.

    Returns:
        The folder. Whether a given path exists is checked when it is opened.

    Raises:
        RequestError: the demo model is unknown or cannot be built here, or standard input gave no path.
        CheckpointError: the Hub has no such model, or is unreachable.
        NetworkError: the demo model could not be downloaded.
    """
    if source == "-":
        source = _first_line_of_stdin()
    if source.startswith("demo:"):
        if source != DEMO:
            raise RequestError(f"{source}: there is one demo model, {DEMO}")
        from compresskit.checkpoint.demo import demo_checkpoint

        demo: Path = demo_checkpoint()
        return demo
    return _from_hub(source) if is_hub_id(source) else _local(source)


def _local(source: str) -> Path:
    try:
        folder = Path(source).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a home that nobody has, a null byte
        raise CheckpointError(f"{shown(source)}: is no path here ({first_line(error)}); give a checkpoint folder") from error
    return folder


def is_hub_id(source: str) -> bool:
    """Whether SOURCE names a model on the Hub: it looks like a Hub id, and no such folder exists."""
    try:
        return HUB_ID.fullmatch(source) is not None and not Path(source).exists()
    except OSError:  # too long a name for a file
        return True


def _first_line_of_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError("-: standard input is a terminal; pipe the path of a checkpoint folder into it")
    line = sys.stdin.readline().strip()
    if not line:
        raise RequestError("-: standard input gave no path; the command before this one has failed")
    return line


def _from_hub(name: str) -> Path:
    """Download a snapshot into the Hub's own cache, without pickles."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    missing = f"{name}: no such folder here"
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, token=os.environ.get("HF_TOKEN")))
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{missing}, and the Hub has no such model; check the name, or log in for a gated one") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(f"{missing}, and the Hub cannot be reached; give the path of a checkpoint folder") from error
