"""What can go wrong, as a tree; each class carries the exit code of the command line.

    CompresskitError           1  the work failed
    ├── RequestError           2  the request cannot be served as it was made (a flag, a path, a value)
    │   ├── CheckpointError    2  a checkpoint folder is unusable: missing, truncated, inconsistent
    │   ├── UnsupportedArchitecture  2  the model family, or what was asked of it, is not known here
    │   └── CalibrationError   2  the calibration text is unusable: missing, empty, too short, not text
    ├── NumericalError         1  NaN or infinity in weights or activations
    ├── NetworkError           1  something had to be downloaded and could not be
    ├── GateError              3  a quality gate was not met; everything was written all the same
    └── Interrupted          130  stopped by a signal; finished blocks are kept for --resume

Every message is one line: what was found, what was expected, what to do, with the file, tensor or value named.
"""

import difflib
from collections.abc import Iterable


class CompresskitError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1


class RequestError(CompresskitError):
    """Refused before any work starts."""

    exit_code = 2


class CheckpointError(RequestError):
    """The checkpoint folder cannot be used."""


class UnsupportedArchitecture(RequestError):
    """The model family, or what is asked of it, is not supported."""


class CalibrationError(RequestError):
    """The calibration text cannot be used."""


class NumericalError(CompresskitError):
    """NaN or infinity was met."""


class NetworkError(CompresskitError):
    """A download was needed and failed."""


class GateError(CompresskitError):
    """A quality gate was not met."""

    exit_code = 3


class Interrupted(CompresskitError):
    """Stopped by the user or by the system."""

    exit_code = 130


def near_miss(value: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the closest of the known names, or nothing."""
    found = difflib.get_close_matches(value, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{found[0]}'?" if found else ""
