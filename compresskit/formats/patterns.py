"""Match the regular expressions of a file against module names, as `re.match` does, but not for ever.

A pattern such as `(a+)+b` takes exponential time. `re` cannot be stopped; the package regex can, and matches alike what
`re` compiles, once the braces that `re` takes as text are escaped (regex reads `a{e<=1}` as "a, with one error").
"""

from __future__ import annotations

import re
import time
import warnings

import regex

from compresskit.checkpoint.small_files import first_line, shown
from compresskit.errors import CheckpointError

SECONDS = 2.0
"""For all patterns of one file together; those that tools write take milliseconds."""
LONGEST_PATTERN = 20_000
"""Compiling takes some 50 microseconds a character at worst."""
PLAIN = re.compile(r"[\w.\-]*", re.ASCII)
"""Patterns of names and dots take linear time."""
TEXT_BRACE = re.compile(r"(\\.)|\{(?!\d*,?\d*\})", re.DOTALL)


class Patterns:
    """The patterns of one file."""

    def __init__(self, where: str):
        """`where` names the file and the key in errors."""
        self.where = where
        self.seconds = SECONDS
        self._known: dict[tuple[str, str], bool] = {}

    def match(self, before: str, pattern: str, after: str, name: str) -> bool:
        """Whether `re.match(before + pattern + after, name)` finds a match; raises CheckpointError if that takes too long."""
        key = (pattern, name)
        if key not in self._known:
            whole = before + pattern + after
            plain = PLAIN.fullmatch(pattern)
            self._known[key] = re.match(whole, name) is not None if plain else self._timed(pattern, whole, name)
        return self._known[key]

    def targets(self, target: str, name: str) -> bool:
        """Whether a config group's target means this linear: by class, by a pattern after `re:`, or by name."""
        pattern = target.startswith("re:")
        return self.match("", target.removeprefix("re:"), "", name) if pattern else target in ("Linear", name)

    def _timed(self, pattern: str, whole: str, name: str) -> bool:
        started = time.monotonic()
        try:
            if self.seconds <= 0:
                raise TimeoutError
            return regex.match(_for_regex(whole), name, timeout=self.seconds) is not None
        except TimeoutError as error:
            raise self._refused(pattern, "takes too long to match") from error
        except (re.error, regex.error, RecursionError, OverflowError, ValueError, MemoryError) as error:
            raise self._refused(pattern, f"is not valid ({first_line(error)})") from error
        finally:
            self.seconds -= time.monotonic() - started

    def _refused(self, pattern: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.where}: the pattern {shown(pattern)} {why}; write the names out")


def _for_regex(pattern: str) -> str:
    """Convert a pattern that `re` compiles to one that regex reads alike; raises ValueError if there is none."""
    if len(pattern) > LONGEST_PATTERN:
        raise ValueError(f"{len(pattern):,} characters, at most {LONGEST_PATTERN:,}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sets that later versions of re may read otherwise
        re.compile(pattern)
    if "[:" in pattern:
        raise ValueError("a set with a colon first")
    return TEXT_BRACE.sub(lambda found: found[1] or r"\{", pattern)
