"""The memory of this process: how much it took at most, and giving back what it no longer uses. Loads no torch."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

KIB = 1024
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt: free bytes at the heap's end that go back to the system; how many large tensors have areas of their own."""
KEPT_BYTES = (1 << 31) - 1
USUAL_TRIM_BYTES, USUAL_AREAS = 64 << 20, 65_536
"""What glibc has by itself once tensors of 32 MB were freed."""


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far (ru_maxrss: KiB on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def restart_peak() -> None:
    """Let `peak_memory_bytes` count from now on, so that a step does not report an earlier one's; Linux alone can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # a kernel or a container without it: the peak stays that of the process
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def glibc_function(name: str) -> Any:
    """A function of the C library, None where it has none of this name: musl's, or on another system than Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def release_freed_memory() -> None:
    """Give the pages of freed tensors back to the system.

    glibc keeps them, in holes that the next block's tensors do not quite fit: over the 24 blocks of a 1.6 B model that
    made the peak 0.4 GB larger.
    """
    trim = glibc_function("malloc_trim")
    if trim is not None:
        trim(0)


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Let glibc keep what is freed within for the next tensors, however large, until it is told to release it.

    It gives areas above 32 MB back at once, and clearing such pages anew took a tenth of the time of a training step.
    """
    tune = glibc_function("mallopt")
    if tune is None:
        yield
        return
    tune(M_MMAP_MAX, 0)
    tune(M_TRIM_THRESHOLD, KEPT_BYTES)
    try:
        yield
    finally:
        tune(M_MMAP_MAX, USUAL_AREAS)
        tune(M_TRIM_THRESHOLD, USUAL_TRIM_BYTES)
        release_freed_memory()
