"""evaluation/task_files.py: rows, limits, shots and malformed lines. Against hand-written expectations."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresskit.errors import RequestError
from compresskit.evaluation.task_files import read_tasks


def test_limit_and_shots_shape_the_rows(folder: Path) -> None:
    (task,) = read_tasks(folder, ["choice"], 1, 2, 0)
    assert len(task.rows) == 1
    assert task.rows[0].prompt.endswith("\n\nQuestion: two and two\nAnswer:")
    assert "The fox jumps over it" in task.rows[0].prompt
    assert read_tasks(folder, ["choice"], 1, 2, 0) == [task]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "needs a question"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "two texts or more"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer 2 is not the index"),
        ('{"text": "word"}', "two words"),
    ],
)
def test_a_malformed_row_is_refused_by_file_and_line(line: str, words: str, folder: Path) -> None:
    (folder / "bad.jsonl").write_text((folder / "choice.jsonl").read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(RequestError, match=rf"bad\.jsonl:2: .*{words}"):
        read_tasks(folder, ["bad"], None, 0, 0)
