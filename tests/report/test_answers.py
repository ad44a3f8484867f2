"""report/answers.py: what the models say stays text, and the mark stands where the answers part.

Oracles: an HTML parser, and words compared one by one.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
from hostile_runs import HOSTILE
from hypothesis import given
from hypothesis import strategies as st

from compresskit.report.answers import answers, common_words


class Page(HTMLParser):
    """Tags, all text, and the text inside <mark>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.marked: list[str] = []
        self.in_mark = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "mark":
            self.in_mark = True
            self.marked.append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_mark = self.in_mark and tag != "mark"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_mark:
            self.marked[-1] += data


def test_what_departs_is_marked_and_what_agrees_is_counted() -> None:
    asked = [
        {"prompt": "a?", "before": "the same words", "after": "the same words"},
        {"prompt": "b?", "before": "the capital is Oslo", "after": "the capital is Osmium"},
        {"prompt": "c?", "before": "one two", "after": "one"},
        {"prompt": "d?", "before": "", "after": "something"},
        {"prompt": "e?", "before": "something", "after": ""},
    ]
    page = Page(answers({"generations": asked}))
    assert page.marked == ["Osmium", "something"]
    assert "1 of 5 answers are the same word for word" in page.text
    assert page.text.count("(nothing)") == 2
    assert "1 more question" in page.text
    assert page.tags.count("article") == 5
    assert page.tags.count("details") == 1


def test_a_model_alone_has_one_side() -> None:
    page = Page(answers({"generations": [{"prompt": "a?", "before": None, "after": "b"}]}))
    assert page.tags.count("dt") == 1
    assert "mark" not in page.tags
    assert "same word for word" not in page.text
    assert answers({}) == answers({"generations": None}) == answers({"generations": []}) == ""


@pytest.mark.parametrize("text", [HOSTILE, "</dd></dl><script>x</script>", "<img src=x onerror=y>", "\x1b[2J\u202eabc", "&amp;<"])
def test_a_model_cannot_write_into_the_page(text: str) -> None:
    html = answers({"generations": [{"prompt": text, "before": text, "after": f"{text} more"}]})
    page = Page(html)
    assert set(page.tags) <= {"section", "h2", "p", "article", "h3", "dl", "div", "dt", "dd", "mark"}
    assert not re.search("[^\n -~]", html)
    plain = "".join(each if each.isprintable() or each == "\n" else " " for each in text)
    assert page.text.count(plain) >= 3


WORDS = st.lists(st.sampled_from(["a", "ab", "abc", "b"]), max_size=6).map(" ".join)


@given(WORDS, WORDS)
def test_the_agreement_ends_with_a_whole_word(before: str, after: str) -> None:
    pairs = list(zip(before.split(), after.split(), strict=False))
    agreeing = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    assert after[: common_words(before, after)].split() == after.split()[:agreeing]
