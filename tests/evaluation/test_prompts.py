"""evaluation/prompts.py: twenty different questions, each of one line."""

from __future__ import annotations

from compresskit.evaluation.prompts import PROMPTS


def test_there_are_twenty_different_questions_of_one_line() -> None:
    assert len(PROMPTS) == len(set(PROMPTS)) == 20
    assert all(prompt.isprintable() and prompt == prompt.strip() for prompt in PROMPTS)
