"""calibration/documentation.py: two parts of Python's documentation that share nothing. Oracle: its own table of topics."""

from __future__ import annotations

import sys
from pydoc_data.topics import topics

from compresskit.calibration import builtin_text, read_text
from compresskit.calibration.sources import BuiltinSource


def test_the_parts_of_the_documentation_share_no_topic() -> None:
    parts = [builtin_text("calibration"), builtin_text("evaluation")]
    for text in topics.values():
        assert sum(text in part for part in parts) == 1
    assert 0.6 < len(parts[0]) / sum(map(len, parts)) < 0.85


def test_the_documentations_description_names_the_python() -> None:
    version = ".".join(map(str, sys.version_info[:3]))
    assert version in read_text(BuiltinSource()).description
    assert len(read_text(BuiltinSource()).text) > 100_000
