"""Answers of the original and of the compressed model, side by side on the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compresskit.report.markup import section, shown

OPEN_ANSWERS = 4
"""The others unfold."""


def answers(report: Mapping[str, Any]) -> str:
    """The section of an evaluation's answers; "" where it asked nothing."""
    found = report.get("generations") or []
    if not found:
        return ""
    compared = [each for each in found if each.get("before") is not None]
    same = sum(each["before"] == each["after"] for each in compared)
    words = "The most likely token at every step, so that the same model gives the same answer."
    if compared:
        words += f" {same} of {len(compared)} answers are the same word for word; where one departs, it is marked."
    first, others = found[:OPEN_ANSWERS], found[OPEN_ANSWERS:]
    content = [f"<p>{words}</p>", *map(_answer, first)]
    if others:
        count = f"{len(others)} more question{'s' if len(others) > 1 else ''}"
        content.append(f"<details><summary>{count}</summary>{''.join(map(_answer, others))}</details>")
    return section("What it answers" if not compared else "Answers before and after", *content, name="answers")


def _answer(each: Mapping[str, Any]) -> str:
    before, after = each.get("before"), each["after"]
    sides = [] if before is None else [("Before", shown(before) or _NOTHING)]
    sides.append(("Answer" if before is None else "After", _marked(before, after)))
    boxes = "".join(f'<div><dt>{name}</dt><dd dir="auto">{text}</dd></div>' for name, text in sides)
    return f'<article><h3 dir="auto">{shown(each["prompt"])}</h3><dl>{boxes}</dl></article>'


_NOTHING = '<span class="soft">(nothing)</span>'


def _marked(before: str | None, after: str) -> str:
    """The answer with what follows its agreement with the one before marked."""
    if not after:
        return _NOTHING
    if before is None or before == after:
        return shown(after)
    agreed = common_words(before, after)
    rest = after[agreed:]
    return shown(after[:agreed]) + (f"<mark>{shown(rest)}</mark>" if rest else "")


def common_words(before: str, after: str) -> int:
    """Number of characters at the start of `after` that agree with `before`, in whole words."""
    agreed = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    ends = [text[agreed : agreed + 1] for text in (before, after)]
    if all(not end or end.isspace() for end in ends):
        return agreed
    while agreed and not after[agreed - 1].isspace():
        agreed -= 1
    return agreed
