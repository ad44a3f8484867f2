"""Resolve SOURCE to a checkpoint folder: a folder, a model on the Hub (hub.py), `demo:NAME`, or `-` for standard input."""

from __future__ import annotations

import sys
from pathlib import Path

from compresskit.checkpoint.hub import download, hub_model
from compresskit.checkpoint.small_files import first_line, shown
from compresskit.errors import CheckpointError, RequestError

DEMO = "demo:smollm2-135m"


def resolve(source: str) -> Path:
    """Resolve a SOURCE argument to a checkpoint folder, downloading it if needed.

    Returns:
        The folder. Whether a given path exists is checked when it is opened.

    Raises:
        RequestError: the demo model is unknown or cannot be built here, or standard input gave no path.
        CheckpointError: the Hub has no such model, or does not give it, or is unreachable.
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
    model = hub_model(source)
    return download(model, source) if model else _local(source)


def _local(source: str) -> Path:
    try:
        folder = Path(source).expanduser()
        folder.is_dir()
    except (OSError, RuntimeError, ValueError) as error:  # too long, a home that nobody has, a null byte
        raise CheckpointError(f"{shown(source)}: is no path here ({first_line(error)}); give a checkpoint folder") from error
    return folder


def hub_name(source: str) -> str | None:
    """The name by which others find SOURCE on the Hub; None for a folder, and for a revision, which a name does not state."""
    model = hub_model(source)
    return model.name if model and model.revision is None else None


def _first_line_of_stdin() -> str:
    if sys.stdin is None or sys.stdin.isatty():
        raise RequestError("-: standard input is a terminal; pipe the path of a checkpoint folder into it")
    line = sys.stdin.readline().strip()
    if not line:
        raise RequestError("-: standard input gave no path; the command before this one has failed")
    return line
