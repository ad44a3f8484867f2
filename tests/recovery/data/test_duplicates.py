"""recovery/data/duplicates.py: equal and nearly equal texts. Against texts made so."""

from __future__ import annotations

from compresskit.recovery.data.duplicates import drop_duplicates


def test_duplicates_are_found_whatever_their_case_and_near_ones_by_their_shingles() -> None:
    words = [f"word{i}" for i in range(60)]
    text = " ".join(words)
    near = " ".join([*words[:-1], "other"])
    far = " ".join(words[30:] + [f"new{i}" for i in range(30)])
    kept, dropped = drop_duplicates([text, text.upper() + "!", near, far])
    assert kept == [0, 3]
    assert dropped == {"duplicate": 1, "near duplicate": 1}
