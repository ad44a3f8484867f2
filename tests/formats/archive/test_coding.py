"""formats/archive/coding.py: near the entropy, exact, and no longer than asked for. Oracle: Shannon's entropy."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compresskit.errors import CheckpointError
from compresskit.formats.archive.coding import AS_IT_IS, QUICK, ZSTD, coded, decoded, zstd


def test_a_run_takes_its_entropy_and_little_more() -> None:
    """Shannon: no fewer than H bytes; Huffman: less than a bit more, here within 2% with the tables."""
    exponents = np.clip(np.random.default_rng(0).normal(120, 1.6, 400_000).round(), 0, 255).astype(np.uint8)
    share = np.bincount(exponents) / len(exponents)
    entropy = -sum(p * np.log2(p) for p in share if p) * len(exponents) / 8
    how, stored = coded(exponents.data, None)
    assert how == ZSTD
    assert entropy <= len(stored) < 1.02 * entropy


def test_repetitions_are_found_where_they_are_looked_for() -> None:
    run = np.random.default_rng(0).bytes(2000) * 20
    assert coded(run, None)[0] == AS_IT_IS
    how, stored = coded(run, QUICK)
    assert how == ZSTD
    assert len(stored) < 2500


@given(st.binary(max_size=600), st.integers(1, 40))
def test_every_run_comes_back(run: bytes, times: int) -> None:
    for level in (None, QUICK):
        how, stored = coded(run * times, level)
        assert len(stored) <= len(run * times)
        assert bytes(decoded(how, stored, len(run * times))) == run * times


@pytest.mark.parametrize("change", [lambda s: s[:-1], lambda s: s + b"x", lambda s: s + s, lambda s: b"", lambda s: s[4:]])
def test_what_is_no_single_whole_frame_is_refused(change: object) -> None:
    _, stored = coded(bytes(5000), QUICK)
    with pytest.raises(CheckpointError):
        decoded(ZSTD, change(stored), 5000)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"instead of 4,999|too long"):
        decoded(ZSTD, stored, 4999)
    with pytest.raises(CheckpointError, match="no coding 7"):
        decoded(7, stored, 5000)


def test_a_frame_that_grows_beyond_what_is_asked_takes_no_memory() -> None:
    bomb = zstd.compress(bytes(100 << 20), level=1)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError):
            decoded(ZSTD, bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
