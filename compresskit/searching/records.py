"""The trials of a search, recorded as they finish, so that an interrupted search goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compresskit.checkpoint.whole_files import storing
from compresskit.searching.knapsack import Assignment

FILE = "trials.jsonl"
Measure = Callable[[Sequence[Assignment], int, int], list[list[float]]]
"""function(assignments, first window, window after the last) -> KL of each window in nats a token, for each assignment."""


@dataclass
class Records:
    """What was measured of every assignment."""

    file: Path
    measure: Measure
    together: int
    """Trials that are measured at the same time."""
    known: dict[Assignment, list[float]] = field(default_factory=dict)
    """KL of the first windows, by assignment."""
    asked: dict[Assignment, int] = field(default_factory=dict)
    """How many windows of each assignment this search has asked for: the same, whether an interrupted one had measured them."""

    @property
    def windows(self) -> int:
        """Windows that all trials together took."""
        return sum(self.asked.values())

    @classmethod
    def read(cls, folder: Path, measure: Measure, together: int) -> Records:
        """The records of an interrupted search in this folder, or none; a line that was not written whole is left out."""
        found = cls(folder / FILE, measure, together)
        lines = found.file.read_text(encoding="utf-8").splitlines(keepends=True) if found.file.is_file() else []
        whole = [line for line in lines if line.endswith("\n")]
        for line in whole:
            entry = json.loads(line)
            found.known[tuple(entry["options"])] = entry["kl"]
        if whole != lines:
            with storing(found.file):
                found.file.write_text("".join(whole), encoding="utf-8")
        return found

    def kl(self, assignments: Sequence[Assignment], windows: int) -> list[float]:
        """Mean KL over the first windows, in nats a token; what is not known yet is measured and recorded."""
        have: dict[int, list[Assignment]] = {}
        for each in dict.fromkeys(assignments):
            done = len(self.known.get(each, ()))
            self.asked[each] = max(self.asked.get(each, 0), windows)
            if done < windows:
                have.setdefault(done, []).append(each)
        for done, missing in have.items():
            for start in range(0, len(missing), self.together):
                part = missing[start : start + self.together]
                self._record(part, self.measure(part, done, windows))
        return [sum(self.known[each][:windows]) / windows for each in assignments]

    def _record(self, assignments: Sequence[Assignment], found: Sequence[Sequence[float]]) -> None:
        with storing(self.file), self.file.open("a", encoding="utf-8") as file:
            for each, values in zip(assignments, found, strict=True):
                self.known[each] = [*self.known.get(each, ()), *values]
                file.write(json.dumps({"options": each, "kl": self.known[each]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
