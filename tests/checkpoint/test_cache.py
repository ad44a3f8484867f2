"""checkpoint/cache.py: the folder by the environment's variables. Oracle."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.checkpoint.cache import cache_folder


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [("/a", "/b", "/a"), ("", "/b", "/b/compresskit"), ("", "", "/home/someone/.cache/compresskit")],
)
def test_the_cache_is_where_the_environment_says(own: str, shared: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSKIT_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path(expected)
