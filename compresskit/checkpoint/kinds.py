"""What the values in a JSON file of a stranger are to be: a text, a number, an object. No torch.

Whatever reads a value for more than its presence asks here first, so that no file makes a reader fail in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compresskit.checkpoint.small_files import shown
from compresskit.errors import CheckpointError


class Kind(NamedTuple):
    """A kind of value."""

    words: str
    """What is expected, for errors."""
    holds: Callable[[Any], bool]
    needed: bool = False
    """Whether the value may neither be missing nor null."""

    @property
    def always(self) -> Kind:
        """The same kind, of a value that must be there."""
        return self._replace(needed=True)


def is_number(value: object) -> bool:
    """Whether this is a finite number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def is_text(value: object) -> bool:
    """Whether this is a text."""
    return isinstance(value, str)


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


def _are_numbers(value: object) -> bool:
    return isinstance(value, dict) and all(each is None or is_number(each) for each in value.values())


TEXT = Kind("a text", is_text)
TEXTS = Kind("a text or a list of texts", lambda value: is_text(value) or _are_texts(value))
NUMBER = Kind("a number", is_number)
NUMBERS = Kind("numbers by name", _are_numbers)
WHOLE_NUMBER = Kind("a whole number", lambda value: type(value) is int)
TRUE_OR_FALSE = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))


class Stated(NamedTuple):
    """A file, the part of it that is looked at, and what to do where it is not as it was written."""

    path: Path
    part: str = ""
    """As in `of step 'prune'`; "" for the whole."""
    remedy: str = "restore the file from its source"

    def check(self, found: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
        """Compare the values of an object with the kinds they are to be of; other values may be anything.

        Raises:
            CheckpointError: one is of another kind, or a needed one is missing; the message names the file and the value.
        """
        for key, kind in kinds.items():
            value = found.get(key)
            if kind.needed if value is None else not kind.holds(value):
                states = f"states {shown(value)} for {key!r}" if key in found else f"states no {key!r}"
                part = f" {self.part}" if self.part else ""
                raise CheckpointError(f"{self.path}: {states}{part}, expected {kind.words}; {self.remedy}")
