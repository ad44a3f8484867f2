"""Calibration: token windows from a text source and a seed, cached, with a digest.

Text sources (`--calibration SPEC`):

    FILE.txt | FILE.jsonl[#COLUMN] | FILE.parquet[#COLUMN]     the column is `text` unless named
    hub:DATASET[/CONFIG][:SPLIT][#COLUMN]                      DATASET is owner/name (a bare name has no CONFIG)
    self                                                       text sampled from the model itself
    builtin                                                    prose of the running Python's documentation
    A+B                                                        equal shares of several, for example self+FILE.txt

The rows of a .jsonl or .parquet file may have images too (`image_rows.py`).

Neither importing this package nor `check` imports torch; `calibrate` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compresskit.calibration.documentation import builtin_description, builtin_text
from compresskit.calibration.image_rows import check_request
from compresskit.calibration.sources import SelfSource, TextRequest, check, parse, read_text
from compresskit.calibration.tokens import encode

if TYPE_CHECKING:
    from compresskit.calibration.windows import Calibration, calibrate

__all__ = [
    "Calibration", "SelfSource", "TextRequest", "builtin_description", "builtin_text", "calibrate", "check", "check_request",
    "encode", "parse", "read_text",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("Calibration", "calibrate"):
        from compresskit.calibration import windows

        return getattr(windows, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
