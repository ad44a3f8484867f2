"""recovery/selection/zip_fit.py: compression distances by their definition. Oracle."""

from __future__ import annotations

import zlib

import pytest

from compresskit.recovery.selection.zip_fit import alignments


def test_compression_distances_are_those_of_the_definition() -> None:
    x, y = b"the quick brown fox " * 5, b"jumps over"
    size = {text: len(zlib.compress(text, 6)) for text in (x, y, x + y)}
    expected = 1 - (size[x + y] - min(size[x], size[y])) / max(size[x], size[y])
    assert alignments([x], [y]) == [pytest.approx(expected)]
