"""Read instruction data: every row of every file as a conversation, whose last answer is what is learned.

`shapes.py` lists the shapes. Each row is read by its own shape, and a row that teaches nothing is counted by its reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresskit.errors import RequestError
from compresskit.recovery.data.files import Row, read_rows
from compresskit.recovery.data.shapes import EMPTY, SURROGATE, Conversation, conversation_of, shape_of
from compresskit.recovery.data.turns import Turn, Turns, Unlearnable

USUAL = (EMPTY, "duplicate", "near duplicate", "truncated", "too long")
"""Reasons that say nothing about the form of the data."""


@dataclass(frozen=True)
class Instruction:
    """One sample: everything before the response, and the response."""

    row: int
    """Number of the row in its file, from 0."""
    file: str
    turns: Turns
    response: str
    source: str
    """The row's own `source`, else the file's name; held-back samples are drawn from each source."""
    beside: dict[str, Any] = field(default_factory=dict)
    """What the response's message holds besides its text, such as tool calls."""
    tools: list[dict[str, Any]] = field(default_factory=list)
    """Descriptions of the tools that may be called."""

    @property
    def message(self) -> Turn:
        """The response as a turn."""
        return {"role": "assistant", "content": self.response, **self.beside}

    @property
    def uses_tools(self) -> bool:
        """Whether a tool is called, or answers."""
        return any(turn["role"] == "tool" or "tool_calls" in turn for turn in (*self.turns, self.message))

    @property
    def text(self) -> str:
        """Full text of the sample."""
        called = [json.dumps(turn["tool_calls"]) for turn in (*self.turns, self.message) if "tool_calls" in turn]
        return "\n".join([*(turn["content"] for turn in self.turns), self.response, *called])


@dataclass
class Reading:
    """Samples that were read, and counts of those left out."""

    samples: list[Instruction]
    shapes: dict[str, str]
    """Shapes of the rows of each file, by name."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped rows, by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Where the first of them stands, by reason, and what was found there."""
    systems_moved: int = 0
    """Samples whose system turn's text went into the first question, because the chat template takes no such turn."""

    def drop(self, reason: str, file: str, row: int, found: str = "") -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first.setdefault(reason, f"{file} row {row}" + (f": {found}" if found else ""))

    def complaints(self) -> list[str]:
        """One line for each unusual reason why rows were left out."""
        return [
            f"{count} row{'s' if count > 1 else ''} left out: {reason} (first {self.first[reason]})"
            for reason, count in self.dropped.items()
            if reason in self.first and reason not in USUAL
        ]


def read_instructions(paths: Sequence[Path]) -> Reading:
    """Read all samples of the files; rows that teach nothing are dropped and counted.

    Returns:
        The samples in file order, the shapes of each file, and the number of dropped rows.

    Raises:
        RequestError: a file is missing, does not match its suffix, or none of its rows can be learned.
    """
    reading = Reading([], {}, {EMPTY: 0})
    for path in paths:
        rows = read_rows(path)
        if not rows:
            raise RequestError(f"{path}: holds no rows; give instruction data")
        _read_file(rows, path, reading)
    return reading


def _read_file(rows: Sequence[Row], path: Path, reading: Reading) -> None:
    shapes: dict[str, None] = {}
    own = Reading([], {})
    for number, row in enumerate(rows):
        try:
            shape = shape_of(row)
            shapes[shape] = None
            own.samples.append(_instruction(conversation_of(row), _source(row, path), path, number))
        except Unlearnable as reason:
            for each in (own, reading):
                each.drop(reason.reason, path.name, number, reason.found)
    if not own.samples:
        reasons = "; ".join(f"{count} {reason} (first {own.first[reason]})" for reason, count in own.dropped.items())
        raise RequestError(f"{path}: none of its {len(rows)} rows can be learned: {reasons}; mend them, or see docs/recover.md")
    reading.samples += own.samples
    reading.shapes[path.name] = ", ".join(shapes)


def _instruction(found: Conversation, source: str, path: Path, number: int) -> Instruction:
    beside = {key: value for key, value in found.answer.items() if key not in ("role", "content")}
    return Instruction(number, path.name, found.turns, found.answer["content"], source, beside, found.tools)


def _source(row: Row, path: Path) -> str:
    """The source that a row names, if it names one by a text or a number."""
    given = row.get("source")
    named = isinstance(given, str | int) and not SURROGATE.search(str(given))
    return str(given or path.stem) if named else path.stem
