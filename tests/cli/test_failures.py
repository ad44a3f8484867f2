"""cli/failures.py: every exception is one line that names what is known. Property."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compresskit.cli.failures import described
from compresskit.errors import NumericalError, StorageError


def raised(work: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        work()
    return caught.value


def nameless() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def nested() -> object:
    return json.loads("[" * 100_000)


def test_an_error_of_the_system_names_its_file(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    assert described(raised(missing.read_text)) == (f"{missing}: No such file or directory", 1)
    assert described(raised(lambda: os.listdir(os.fsencode(missing))))[0].startswith(f"{missing}: ")  # noqa: PTH208


def test_an_error_of_renaming_names_both_files(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    assert described(raised(lambda: old.rename(new)))[0] == f"{old} -> {new}: No such file or directory"


def test_an_error_without_a_file_says_where_it_was_raised(tmp_path: Path) -> None:
    from compresskit.checkpoint.reader import read_json

    assert described(raised(nameless))[0] == "No space left on device (--verbose shows where)"
    (tmp_path / "deep.json").write_text("[" * 100_000)
    message, code = described(raised(lambda: read_json(tmp_path / "deep.json")))
    assert code in {1, 2}
    assert str(tmp_path / "deep.json") in message


def test_an_error_that_passed_the_package_names_its_function_and_paths(tmp_path: Path) -> None:
    from compresskit.checkpoint.whole_files import write_whole

    message, _ = described(raised(lambda: write_whole(tmp_path / "a", "\udcff")))
    assert "UnicodeEncodeError" in message
    assert f"in write_whole of checkpoint/whole_files.py with {tmp_path / 'a'}" in message


def test_memory_that_runs_out_is_named_and_helped() -> None:
    for error in (MemoryError(), raised(lambda: torch.empty(1 << 50))):
        message, code = described(error)
        assert code == 1
        assert message.startswith("out of memory")
        assert "--samples" in message


def test_a_library_s_error_is_one_printable_line(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\xff" * 64)
    errors = [
        raised(lambda: safe_open(damaged, "pt")),
        raised(nested),
        raised(b"\xff".decode),
        ValueError("two\nlines \x1b[2J"),
        NumericalError("file\nname"),
        StorageError("\x1b[2J"),
    ]
    for error in errors:
        message, code = described(error)
        assert message.isprintable()
        assert message
        assert code == 1
    assert "nested too deeply" in described(errors[1])[0]
