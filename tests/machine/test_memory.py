"""machine/memory.py: freed memory is kept where that was asked for, and given back at its end. Oracle: /proc."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compresskit.machine.memory import freed_memory_kept, glibc_function

TENSOR_BYTES = 128 << 20
HELD_AFTER_FREEING = """
import resource
from pathlib import Path

import torch

from compresskit.machine.memory import freed_memory_kept, peak_memory_bytes


def held_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def freed() -> int:
    tensor = torch.ones({tensor_bytes} // 4)
    del tensor
    return held_bytes()


freed()  # what the first tensor of a process brings along does not count
before = held_bytes()
with freed_memory_kept():
    within = freed()
print(within - before, held_bytes() - before, freed() - before, peak_memory_bytes() - before)
"""


@pytest.mark.skipif(glibc_function("mallopt") is None, reason="only glibc keeps freed memory; the next test is of all others")
def test_freed_memory_is_kept_within_and_given_back_after() -> None:
    # In a process of its own: the heap of this one has room from earlier tests, which a tensor takes without growing it.
    script = HELD_AFTER_FREEING.format(tensor_bytes=TENSOR_BYTES)
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=300).stdout
    within, after, later, peak = map(int, printed.split())
    assert within > 0.9 * TENSOR_BYTES
    assert after < 0.1 * TENSOR_BYTES
    assert later < 0.1 * TENSOR_BYTES
    assert peak > 0.9 * TENSOR_BYTES


def test_where_there_is_no_glibc_the_context_is_entered_and_left_without_a_call_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str | None) -> None:
        raise AssertionError("a C library was opened")

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("compresskit.machine.memory.ctypes.CDLL", refuse)
    with freed_memory_kept():
        entered = True
    assert entered
