"""The package's exceptions; each class carries the exit code of the command line.

    CompresskitError           1  the work failed
    ├── RequestError           2  a flag, path or value of the request is invalid
    │   ├── CheckpointError    2  a checkpoint folder is unusable: missing, truncated, inconsistent
    │   ├── UnsupportedArchitecture  2  the model family, or an operation on it, is not supported
    │   └── CalibrationError   2  the calibration text is unusable: missing, empty, too short, not text
    ├── NumericalError         1  NaN or infinity in weights or activations
    ├── NetworkError           1  a download failed
    ├── StorageError           1  a disk failed or is full; finished work stays, and --resume goes on where the command has it
    ├── GateError              3  a quality gate failed; all output was still written
    └── Interrupted          130  stopped by a signal; finished blocks are kept for --resume

Each message is one line. It states what was found, what was expected and what to do, and names the file, tensor or value.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST_NAME, MOST_NAMES = 200, 2000
"""Of what is compared for a hint: the time grows with their product."""


class CompresskitError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1

    def __str__(self) -> str:
        """The message on one line, whatever the names in it hold."""
        return "".join(each if each.isprintable() else repr(each)[1:-1] for each in super().__str__())


class RequestError(CompresskitError):
    """The request was refused before any work started."""

    exit_code = 2


class CheckpointError(RequestError):
    """The checkpoint folder is unusable."""


class UnsupportedArchitecture(RequestError):
    """The model family, or an operation on it, is not supported."""


class CalibrationError(RequestError):
    """The calibration text is unusable."""


class NumericalError(CompresskitError):
    """Weights or activations contain NaN or infinity."""


class NetworkError(CompresskitError):
    """A required download failed."""


class StorageError(CompresskitError):
    """A disk failed or is full; what was finished stays."""


class StorageWarning(UserWarning):
    """The result is whole, but the disk did not confirm it, or something could not be removed."""


class RankError(CompresskitError):
    """Another process of a distributed run has ended."""


class GateError(CompresskitError):
    """A quality gate failed."""

    exit_code = 3


class Interrupted(CompresskitError):
    """The user or the system stopped the run."""

    exit_code = 130


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Put what is worked on, such as a linear's name, before the message of a NumericalError."""
    try:
        yield
    except NumericalError as error:
        raise NumericalError(f"{what}: {error}") from error


def near_miss(value: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known name, or an empty string."""
    found = difflib.get_close_matches(value[:LONGEST_NAME], list(known)[:MOST_NAMES], n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
