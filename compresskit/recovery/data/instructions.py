"""Read instruction data from JSONL, JSON or parquet files in the four common shapes.

    Alpaca           instruction, input, output (or response)
    Dolly            instruction, context, response
    messages         messages or conversations: [{role, content}] or ShareGPT's [{from, value}]; the last answer is the response
    prompt-response  prompt (or question) and response (completion, answer, output)

The shape of each file is detected from its first row and reported.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresskit.checkpoint.small_files import first_line, json_value, read_text
from compresskit.errors import RequestError

SUFFIXES = (".jsonl", ".json", ".parquet")
ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system",
}  # fmt: skip
"""Role of a turn, by the speaker names used in data sets."""
CONVERSATIONS = ("messages", "conversations")
PROMPTS = ("prompt", "question", "query")
RESPONSES = ("response", "completion", "answer", "output")
CONTEXTS = ("input", "context")
SHOWN_KEYS = 8
SHOWN_KEY = 40
"""Keys of a row, and characters of each, that an error lists."""
LARGEST_BYTES = 1 << 31
"""OpenHermes 2.5, a million conversations, has 1.9 GB."""
PARQUET_BATCH_ROWS = 64
"""A column may repeat one long text in every row."""

Turns = list[dict[str, str]]
"""[{"role": ..., "content": ...}], without the response."""
Row = dict[str, Any]


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

    @property
    def text(self) -> str:
        """Full text of the sample."""
        return "\n".join([*(turn["content"] for turn in self.turns), self.response])


@dataclass
class Reading:
    """Samples that were read, and counts of those left out."""

    samples: list[Instruction]
    shapes: dict[str, str]
    """Shape of each file, by name."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of dropped rows, by reason."""


def read_instructions(paths: Sequence[Path]) -> Reading:
    """Read all samples of the files; empty ones are dropped and counted.

    Returns:
        The samples in file order, the shape of each file, and the number of dropped rows.

    Raises:
        RequestError: a file is missing, does not match its suffix, or holds no instruction data.
    """
    reading = Reading([], {}, {"empty": 0})
    for path in paths:
        rows = _rows(path)
        if not rows:
            raise RequestError(f"{path}: holds no rows; give instruction data")
        shape, convert = _shape_of(rows[0], path)
        reading.shapes[path.name] = shape
        for number, row in enumerate(rows):
            turns, response = _converted(convert, row, path, number)
            if response.strip() and any(turn["content"].strip() for turn in turns if turn["role"] == "user"):
                source = str(row.get("source") or path.stem)
                reading.samples.append(Instruction(number, path.name, turns, response.strip(), source))
            else:
                reading.dropped["empty"] += 1
    return reading


def _rows(path: Path) -> list[Row]:
    if path.suffix.lower() not in SUFFIXES:
        raise RequestError(f"{path}: instruction data is read from {', '.join(SUFFIXES)} files; convert it")
    if not path.is_file():
        raise RequestError(f"{path}: no such file; give instruction data as --data FILE.jsonl")
    if path.suffix.lower() == ".parquet":
        return _parquet_rows(path)
    text = read_text(path, LARGEST_BYTES, RequestError)
    if path.suffix.lower() == ".json":
        return _checked_rows(_parsed(text, path, 1), path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return _checked_rows([_parsed(line, path, number) for number, line in lines], path)


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json_value(text, finite=False)
    except ValueError as error:
        line += getattr(error, "lineno", 1) - 1
        raise RequestError(f"{path}: line {line} is not JSON ({first_line(error)}); mend or remove it") from error


def _checked_rows(value: Any, path: Path) -> list[Row]:
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise RequestError(f"{path}: expected JSON objects, one a sample; give a list of objects, or one object a line")
    return value


def _parquet_rows(path: Path) -> list[Row]:
    if importlib.util.find_spec("pyarrow") is None:
        raise RequestError(f"{path}: reading parquet takes pyarrow; pip install 'compresskit[data]'")
    from pyarrow import parquet

    rows: list[Row] = []
    size = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches(PARQUET_BATCH_ROWS):
            size += batch.nbytes
            if size > LARGEST_BYTES:
                break
            rows += batch.to_pylist()
    except Exception as error:  # pyarrow raises errors of every kind
        raise RequestError(f"{path}: not a readable parquet file ({first_line(error)}); write it again") from error
    if size > LARGEST_BYTES:
        raise RequestError(f"{path}: unpacks to more than {LARGEST_BYTES:,} bytes; give a part of it")
    return rows


Converter = Callable[[Row], tuple[Turns, str]]


def _shape_of(row: Row, path: Path) -> tuple[str, Converter]:
    """Return (name, converter) of a row's shape; RequestError names the keys if no shape fits."""
    turns = next((key for key in CONVERSATIONS if isinstance(row.get(key), list)), None)
    if turns is not None:
        return "messages", lambda row: _from_messages(row[turns])
    response = next((key for key in RESPONSES if key in row), None)
    keys = ", ".join(repr(key[:SHOWN_KEY]) for key in list(row)[:SHOWN_KEYS])
    if response is None:
        raise RequestError(f"{path}: its rows have no response field (keys: {keys}); rename one to output or response")
    if "instruction" in row:
        context = next((key for key in CONTEXTS if key in row), "input")
        return "dolly" if context == "context" else "alpaca", lambda row: _from_fields(row, ("instruction", context), response)
    prompt = next((key for key in PROMPTS if key in row), None)
    if prompt is None:
        raise RequestError(f"{path}: its rows have no instruction or prompt field (keys: {keys}); rename one to instruction")
    return "prompt-response", lambda row: _from_fields(row, (prompt,), response)


def _from_fields(row: Row, prompts: tuple[str, ...], response: str) -> tuple[Turns, str]:
    asked = "\n\n".join(part for part in (str(row.get(key) or "").strip() for key in prompts) if part)
    return [{"role": "user", "content": asked}], str(row[response] or "")


def _from_messages(messages: list[dict[str, Any]]) -> tuple[Turns, str]:
    turns = []
    for message in messages:
        speaker = str(message["role"] if "role" in message else message["from"]).lower()
        content = message["content"] if "content" in message else message["value"]
        turns.append({"role": ROLES[speaker], "content": str(content or "")})
    last = max((index for index, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    return (turns[:last], turns[last]["content"]) if last >= 0 else (turns, "")


def _converted(convert: Converter, row: Row, path: Path, number: int) -> tuple[Turns, str]:
    try:
        return convert(row)
    except (KeyError, TypeError) as error:
        what = f"{first_line(error)} is missing or unknown"
        raise RequestError(f"{path}: row {number} is not like the first one ({what}); mend it") from error
