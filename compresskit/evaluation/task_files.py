"""Tasks in local files: FOLDER/NAME.jsonl, one row per line.

{"question": "...", "choices": ["...", "..."], "answer": 1}    choose the likeliest continuation of the question
{"text": "... word"}                                            predict the last word (LAMBADA)
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, NamedTuple

from compresskit.checkpoint.small_files import json_value, read_text, shown
from compresskit.errors import RequestError, near_miss

LARGEST_BYTES = 1 << 28
"""All tasks of lm-eval have files below 100 MB."""
SHOT_SEPARATOR = "\n\n"


class Row(NamedTuple):
    """One question: a prompt, its possible continuations, and the index of the right one."""

    prompt: str
    continuations: tuple[str, ...]
    """Including the space that separates them from the prompt."""
    answer: int
    lengths: tuple[int, ...]
    """Characters of each continuation, without the leading space."""


class Task(NamedTuple):
    """The rows of one file."""

    name: str
    rows: list[Row]
    choices: bool
    """Whether the task is multiple choice; otherwise the last word is predicted."""


def read_tasks(folder: Path, names: list[str], limit: int | None, shots: int, seed: int) -> list[Task]:
    """Read the named tasks from FOLDER/NAME.jsonl, with `shots` solved rows of the same file before every question.

    Returns:
        The tasks in the order of the names, with the first `limit` rows of each (None for all).

    Raises:
        RequestError: a task is missing or malformed (the message names file and line), or has too few rows for the shots.
    """
    if not folder.is_dir():
        raise RequestError(f"--tasks-folder {folder}: no such folder; give the one that holds NAME.jsonl files")
    known = sorted(path.stem for path in folder.glob("*.jsonl"))
    tasks = []
    for name in names:
        if name not in known:
            raise RequestError(f"--tasks {name}: not in {folder};{near_miss(name, known)} There are {', '.join(known) or 'none'}")
        path = folder / f"{name}.jsonl"
        text = read_text(path, LARGEST_BYTES, RequestError)
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [_row(path, number, line) for number, line in lines]
        kinds = {len(row.continuations) > 1 for row in rows}
        if len(kinds) != 1:
            raise RequestError(f"{path}: " + ("mixes choices and texts; make two files" if kinds else "holds no rows"))
        if shots >= len(rows):
            raise RequestError(f"--few-shot {shots}: {path} has {len(rows)} rows; ask for fewer")
        chosen = rows if limit is None else rows[:limit]
        tasks.append(Task(name, [_with_shots(row, rows, shots, seed) for row in chosen], kinds == {True}))
    return tasks


def _row(path: Path, number: int, line: str) -> Row:
    place = f"{path}:{number}"
    try:
        found: Any = json_value(line, finite=False)
    except ValueError as error:
        raise RequestError(f"{place}: not valid JSON ({error}); write one object a line") from error
    if isinstance(found, dict) and isinstance(found.get("text"), str):
        context, space, word = found["text"].rstrip().rpartition(" ")
        if not context.strip() or not word:
            raise RequestError(f"{place}: a text needs two words or more")
        return Row(context, (space + word,), 0, (len(word),))
    question, choices, answer = (found.get(key) if isinstance(found, dict) else None for key in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise RequestError(f"{place}: needs a question with choices and answer, or a text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise RequestError(f"{place}: choices must be two texts or more")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise RequestError(f"{place}: answer {shown(answer)} is not the index of one of {len(choices)} choices")
    return Row(question, tuple(f" {choice}" for choice in choices), answer, tuple(len(choice) for choice in choices))


def _with_shots(row: Row, rows: list[Row], shots: int, seed: int) -> Row:
    if not shots:
        return row
    others = [each for each in rows if each is not row]
    picked = random.Random(f"{seed} {row.prompt}").sample(others, shots)  # noqa: S311
    solved = [each.prompt + each.continuations[each.answer] for each in picked]
    return row._replace(prompt=SHOT_SEPARATOR.join([*solved, row.prompt]))
