"""machine/progress.py: the stopwatch's sums by name, also of what fails. Property tests."""

from __future__ import annotations

import time

import pytest

from compresskit.machine.progress import timed


def test_times_of_a_name_add_up() -> None:
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    for what in ("one", "two", "one"):
        with timed(seconds, what):
            time.sleep(0.01)
    whole = time.perf_counter() - started
    assert set(seconds) == {"one", "two"}
    assert seconds["one"] >= 0.02 and seconds["two"] >= 0.01
    assert sum(seconds.values()) <= whole


def test_what_fails_is_timed_and_fails() -> None:
    seconds: dict[str, float] = {}
    with pytest.raises(ValueError, match="no"), timed(seconds, "one"):
        raise ValueError("no")
    assert seconds["one"] >= 0
