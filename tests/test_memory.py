"""Freed memory is kept where that was asked for, and given back at its end."""

from __future__ import annotations

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


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; elsewhere the context does nothing")
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
