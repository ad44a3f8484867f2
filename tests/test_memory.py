"""Freed memory is kept where that was asked for, and given back at its end."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import pytest
import torch

from compresskit.memory import freed_memory_kept, peak_memory_bytes

TENSOR_BYTES = 128 << 20


def held_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc: the test below is what holds there")
def test_freed_memory_is_kept_within_and_given_back_after() -> None:
    before = held_bytes()
    with freed_memory_kept():
        tensor = torch.ones(TENSOR_BYTES // 4)
        del tensor
        assert held_bytes() - before > 0.9 * TENSOR_BYTES
    assert held_bytes() - before < 0.1 * TENSOR_BYTES
    tensor = torch.ones(TENSOR_BYTES // 4)
    del tensor
    assert held_bytes() - before < 0.1 * TENSOR_BYTES
    assert peak_memory_bytes() >= before


def test_where_there_is_no_glibc_the_context_is_entered_and_left_without_a_call_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str | None) -> None:
        raise AssertionError("a C library was opened")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("compresskit.memory.ctypes.CDLL", refuse)
    with freed_memory_kept():
        entered = True
    assert entered
