"""Progress bars on standard error (activity, blocks, time left, peak memory), silent without a terminal; and a stopwatch."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import TracebackType

from compresskit.machine.memory import peak_memory_bytes


class ProgressBars:
    """One bar per activity; calling the object moves a bar. Drawn only on a terminal, unless `quiet`."""

    def __init__(self, quiet: bool = False):
        self.bars = None
        self.tasks: dict[str, int] = {}
        if quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("peak {task.fields[peak]:.2f} GB"), console=Console(stderr=True), transient=True,
        )  # fmt: skip

    def __enter__(self) -> ProgressBars:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bars:
            self.bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """Move the bar of this activity; the first call creates it."""
        if not self.bars:
            return
        peak = peak_memory_bytes() / 1e9
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, peak=peak)
        self.bars.update(self.tasks[what], completed=done, total=total, peak=peak)  # type: ignore[arg-type]

    def of(self, what: str) -> Callable[[int, int], None]:
        """Return a function(done, total) that moves one bar."""
        return partial(self, what)


@contextmanager
def timed(seconds: dict[str, float], what: str) -> Iterator[None]:
    """Add the elapsed time of this context to `seconds[what]`."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[what] = seconds.get(what, 0.0) + time.perf_counter() - started
