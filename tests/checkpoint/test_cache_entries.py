"""checkpoint/cache_entries.py: what is listed is what lies there; what is not ours, young or at work stays. Property."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from filelock import FileLock

from compresskit.checkpoint import cache_entries, demo
from compresskit.errors import RequestError

DAY = 86_400


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with an entry of each kind, 1, 2 and 3 days old, and files that are not ours."""
    root = tmp_path / "cache"
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(root))
    made = {
        root / "demo" / demo.NAME / demo.RECORD: 3,
        root / "calibration" / f"{'a' * 64}.safetensors": 2,
        root / "structures" / f"{'b' * 64}.json": 1,
        root / "structures" / "notes.json": 9,
        root / "calibration" / f"{'a' * 64}.json": 9,
        root / "mine" / f"{'c' * 64}.json": 9,
    }
    for path, days in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}" * days)
        os.utime(path, (time.time() - days * DAY,) * 2)
    (root / "demo" / demo.NAME / "model.safetensors").write_bytes(bytes(100))
    return root


def test_entries_are_listed_with_size_and_age_the_oldest_first(cache: Path) -> None:
    found = cache_entries.entries()
    assert [(each.kind, each.bytes, round(each.days, 2)) for each in found] == [
        ("demo", 106, 3.0), ("calibration", 4, 2.0), ("structures", 2, 1.0),
    ]  # fmt: skip
    assert [each.kind for each in cache_entries.entries(["demo", "structures"], older_than=1.5)] == ["demo"]


def test_an_empty_cache_has_no_entries_and_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPRESSKIT_CACHE", str(tmp_path / "none"))
    assert cache_entries.entries() == []
    assert not (tmp_path / "none").exists()


def test_an_unknown_kind_is_refused_with_the_near_miss(cache: Path) -> None:
    with pytest.raises(RequestError, match=r"--kind struct: the cache has demo, calibration, structures.*'structures'"):
        cache_entries.entries(["struct"])


def test_removing_leaves_what_is_not_ours(cache: Path) -> None:
    found = cache_entries.entries()
    assert [cache_entries.remove(each) for each in found] == [None, None, None]
    left = {str(path.relative_to(cache)) for path in cache.rglob("*") if path.is_file()} - {f"demo/{demo.NAME}.lock"}
    assert left == {"structures/notes.json", f"calibration/{'a' * 64}.json", f"mine/{'c' * 64}.json"}
    assert cache_entries.remove(found[-1]) is None  # somebody else was faster


def test_the_demo_model_stays_while_another_is_at_work_on_it(cache: Path) -> None:
    (entry,) = cache_entries.entries(["demo"])
    with FileLock(cache / "demo" / f"{demo.NAME}.lock"):
        assert cache_entries.remove(entry) == f"{entry.path}: another process is at work on it"
    assert (entry.path / "model.safetensors").is_file()


def test_links_lead_nowhere_else(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}")
    link = cache / "structures" / f"{'d' * 64}.json"
    link.symlink_to(outside)
    for each in cache_entries.entries():
        cache_entries.remove(each)
    assert outside.is_file()
    assert not link.is_symlink()
