"""Signals that stop a run: the first raises KeyboardInterrupt, those that follow leave its clean-up alone.

SIGINT (Ctrl-C), SIGTERM and SIGHUP act alike; one that the caller had set to be ignored, as nohup does, stays ignored.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import time

TYPE_CHECKING = False  # see compresskit/__init__.py
if TYPE_CHECKING:
    from sys import UnraisableHookArgs
    from types import FrameType

INTERRUPTED = 130
"""Exit code, as of a shell's command that Ctrl-C stopped."""
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PATIENCE_SECONDS = 5.0
"""A signal this long after the first ends the process at once, as SIGKILL does: something swallowed the first, or hangs."""
RETRY_SECONDS = 0.01


class Interrupts:
    """The signals that a process receives from `listen` on."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.outcome: int | None = None
        """Exit code, from when on it is certain."""
        self.since = 0.0
        """When the first signal came or the outcome was certain, of time.monotonic()."""
        self.handlers = {each: signal.getsignal(each) for each in STOPPING}
        self.hook = sys.unraisablehook

    def listen(self, to_the_end: bool) -> None:
        """Raise KeyboardInterrupt at the first signal; `to_the_end`: the process ends with what it runs now."""
        if to_the_end:
            atexit.register(self._ignore)  # runs last; after that Python would let a signal kill the process
        for each, handler in self.handlers.items():
            if handler != signal.SIG_IGN:
                signal.signal(each, self._received)
        sys.unraisablehook = self._unraisable

    def settle(self, code: int) -> None:
        """From here on no signal changes how the process ends; what is left is to say so."""
        self.since = time.monotonic()
        self.outcome = code

    def restore(self) -> None:
        """Give the signals back to whoever handled them before."""
        for each, handler in self.handlers.items():
            if handler is not None:  # None: not a handler of Python's
                signal.signal(each, handler)
        sys.unraisablehook = self.hook

    def _ignore(self) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)

    def _received(self, number: int, frame: FrameType | None) -> None:
        first = self.outcome is None and not self.received
        if first:
            self.since = time.monotonic()  # before all else: the next signal may come within this function
        self.received.append(number)
        if first:
            raise KeyboardInterrupt
        if time.monotonic() - self.since > PATIENCE_SECONDS:
            self._end_at_once()

    def _end_at_once(self) -> None:
        try:
            if self.outcome is None:
                os.write(2, b"compresskit: error: interrupted again, ended at once\n")
        finally:
            os._exit(INTERRUPTED if self.outcome is None else self.outcome)

    def _unraisable(self, found: UnraisableHookArgs) -> None:
        """Python drops what is raised in a finalizer or a weak reference's callback: raise it again outside of it."""
        if not issubclass(found.exc_type, KeyboardInterrupt):
            self.hook(found)
            return
        signal.signal(signal.SIGALRM, self._again)
        signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS)

    def _again(self, number: int, frame: FrameType | None) -> None:
        if self.outcome is None:
            raise KeyboardInterrupt
