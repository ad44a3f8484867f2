"""Forks of a test that die while they change the disk, and leave what a kill at that moment leaves."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from compresskit.checkpoint import folder as folders

KILLED = 9


def dying_at(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a fork that dies at its `step`-th change of the disk; whether it came to its end.

    It dies before a name is made, changed or removed, and after a file is made that holds nothing yet.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _die_at(step)
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _die_at(step: int) -> None:
    seen = 0

    def count() -> bool:
        nonlocal seen
        seen += 1
        return seen == step

    def counted(call: Callable[..., object]) -> Callable[..., object]:
        def changing(*arguments: object, **named: object) -> object:
            if count():
                os._exit(KILLED)
            return call(*arguments, **named)

        return changing

    def opened(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT and count():
            os.open(arguments[0], arguments[2], 0o666)  # type: ignore[arg-type]  # counted too, and past the step
            os._exit(KILLED)

    for name in ("rename", "unlink", "mkdir", "rmdir", "replace"):
        setattr(Path, name, counted(getattr(Path, name)))
    for name in ("unlink", "rmdir"):  # of rmtree
        setattr(os, name, counted(getattr(os, name)))
    folders.exchange = counted(folders.exchange)  # type: ignore[assignment]
    sys.addaudithook(opened)
