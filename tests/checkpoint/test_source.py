"""checkpoint/source.py: SOURCE as users write it, and what is no source. Oracle."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from compresskit.checkpoint.source import resolve
from compresskit.errors import CheckpointError, RequestError


def test_a_dash_reads_the_path_from_standard_input(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{tmp_path}\nmore\n"))
    assert resolve("-") == tmp_path
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(RequestError, match="gave no path"):
        resolve("-")


def test_an_unknown_demo_is_refused() -> None:
    with pytest.raises(RequestError, match="demo:smollm2-135m"):
        resolve("demo:llama-70b")


def test_a_hub_id_that_cannot_be_had_says_that_no_such_folder_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="no such folder here"):
        resolve("nobody-at-all/no-such-model")
