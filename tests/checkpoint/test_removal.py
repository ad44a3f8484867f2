"""checkpoint/folder.py: what is removed is whole or gone at any moment, and only ours is removed. Property."""

from __future__ import annotations

from pathlib import Path

import pytest
from dying_children import dying_at

from compresskit.checkpoint.folder import discard, held, remove, start_result
from compresskit.errors import RequestError


def make(out: Path) -> Path:
    """A finished folder of ours."""
    out.mkdir()
    (out / "compresskit.json").write_text('{"tool": "compresskit"}')
    for name in "abc":
        (out / name).touch()
    return out


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_killed_at_any_step_of_its_removal_a_folder_is_whole_or_gone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for step in range(1, 30):
        made = names(make(out))
        came_to_its_end = dying_at(step, lambda: remove(out))
        assert not out.exists() or names(out) == made
        if out.exists():
            remove(out)
        discard(out)
        assert names(tmp_path) == set()
        if came_to_its_end:
            break
    assert came_to_its_end


def test_killed_at_any_step_of_its_removal_unfinished_work_is_whole_or_gone(tmp_path: Path) -> None:
    """A record that says what is there outlives nothing of it."""
    out = tmp_path / "out"
    for step in range(1, 40):
        with pytest.raises(KeyboardInterrupt), held(out, overwrite=False) as work:
            start_result(work)
            for name in ("a", "request.json", "tokens.i32", "z"):
                work.training.mkdir(exist_ok=True)
                (work.training / name).touch()
            raise KeyboardInterrupt
        made = names(work.training)
        came_to_its_end = dying_at(step, lambda: discard(out))
        assert not work.training.exists() or names(work.training) == made
        discard(out)
        assert names(tmp_path) == set()
        if came_to_its_end:
            break
    assert came_to_its_end


def test_a_foreign_folder_under_the_name_of_the_work_folder_is_not_removed_with_the_result(tmp_path: Path) -> None:
    out = make(tmp_path / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").touch()
    with pytest.raises(RequestError, match=r"out\.partial: is in the way"):
        remove(out)
    discard(out)
    assert names(out) == {"compresskit.json", "a", "b", "c"}
    assert names(tmp_path / "out.partial") == {"thesis.tex"}
