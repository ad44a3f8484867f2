"""recovery/selection/dsir.py: hashed frequencies by their definition. Oracle."""

from __future__ import annotations

import pytest

from compresskit.recovery.selection.dsir import distribution, hashed_ngrams


def test_hashed_frequencies_are_those_of_the_definition() -> None:
    assert len(hashed_ngrams("One two, three", 100)) == 5
    assert distribution([[0, 0, 1]], 4).tolist() == pytest.approx([3 / 7, 2 / 7, 1 / 7, 1 / 7])
