"""What the manifest of a compressed model says of how its weights compare with the original's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresskit.checkpoint.manifest import chain
from compresskit.errors import RequestError
from compresskit.methods import METHODS, method_class


def trained_by_block(record: Mapping[str, Any] | None) -> bool:
    """Whether a manifest says that `quantize` trained whole blocks, so that no weight alone need be near the original's."""
    name = record.get("method") if record and record.get("stage") == "quantize" else None
    return name in METHODS["quantize"] and bool(getattr(method_class("quantize", str(name)), "trains_blocks", False))


def check_same_scales(record: dict[str, Any] | None, folder: Path) -> None:
    """Raise RequestError if a manifest says that SmoothQuant rescaled the columns of the weights, which then have no residual."""
    for link in chain(record):
        settings = link.get("settings")
        if isinstance(settings, dict) and settings.get("smoothing"):
            raise RequestError(f"{folder}: its weights were rescaled by --smoothing; quantize without it to compensate")
