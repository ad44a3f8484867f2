"""Fixtures of the tests of evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

QUESTIONS = [
    {"question": "Question: two and two\nAnswer:", "choices": ["four", "five apples", "a"], "answer": 0},
    {"question": "The fox jumps over", "choices": ["the dog", "it"], "answer": 1},
    {"question": "A", "choices": ["rather long continuation of a very short question", "b", "c"], "answer": 2},
]
TEXTS = [{"text": "the quick brown fox"}, {"text": "one two three two one "}, {"text": "a b"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, rows in (("choice", QUESTIONS), ("words", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path
