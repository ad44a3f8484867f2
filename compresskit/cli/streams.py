"""Standard output, for the result alone, and standard error, for all else; either may be closed or full.

A file's name or content reaches a terminal with its control characters escaped, so that it cannot move the cursor.
"""

from __future__ import annotations

import io
import os
import sys

TYPE_CHECKING = False  # see compresskit/__init__.py
if TYPE_CHECKING:
    from typing import TextIO

    from _typeshed import ReadableBuffer

STANDARD_OUTPUT = "standard output"


def escaped(text: str) -> str:
    """Text without control characters: all that is not printable, line ends aside, becomes its escape sequence."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in text)


def one_line(text: str) -> str:
    """Text of a library, or with a file's name in it, in one line."""
    return escaped(" ".join(text.split()))


def log(message: str, quiet: bool = False) -> None:
    """Print on standard error. That it is closed or full is no reason to stop the work."""
    if quiet or sys.stderr is None:
        return
    try:
        sys.stderr.write(escaped(message) + "\n")
        sys.stderr.flush()
    except (OSError, ValueError):  # ValueError: closed
        return


def show(result: str) -> None:
    """Print the result on standard output, at once.

    Raises:
        OSError: standard output is closed or full.
    """
    if sys.stdout is not None:
        sys.stdout.write((escaped(result) if sys.stdout.isatty() else result) + "\n")
        sys.stdout.flush()


def guard() -> None:
    """Make this process's standard streams safe, whatever the caller did to them.

    A closed one becomes the null device, lest the next file that is opened takes its number and receives what is printed.
    Writing to a standard output that was closed fails, as the caller has to know; what standard error cannot take is lost.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_WRONLY if descriptor == 2 else os.O_RDONLY)
    sys.stdout = _text(_Stream(1, STANDARD_OUTPUT), sys.stdout, "surrogateescape")
    sys.stderr = _text(_Stream(2, None), sys.stderr, "backslashreplace")


def silence() -> None:
    """Print nothing from here on, until `speak`: another process speaks for this one."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    sys.stdout, sys.stderr = (_text(_Stream(nothing, None), None, "backslashreplace") for _ in range(2))


def speak() -> None:
    """Print on standard error again."""
    sys.stderr = sys.__stderr__ or sys.stderr


class _Stream(io.FileIO):
    """One of this process's standard streams: fails once, with its name, or never if it has none."""

    def __init__(self, descriptor: int, name: str | None):
        super().__init__(descriptor, "w", closefd=False)
        self.called = name
        self.failed = False

    def write(self, data: ReadableBuffer, /) -> int:
        if not self.failed:
            try:
                return super().write(data)
            except OSError as error:
                self.failed = True
                if self.called:
                    raise OSError(error.errno, error.strerror, self.called) from error
        return len(memoryview(data))


def _text(stream: _Stream, like: TextIO | None, errors: str) -> io.TextIOWrapper:
    encoding = like.encoding if like else "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(stream), encoding, errors, line_buffering=stream.isatty() or not stream.called)
