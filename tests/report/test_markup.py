"""report/markup.py: every text of a table is a text. Oracle: an HTML parser."""

from __future__ import annotations

from html.parser import HTMLParser

from hostile_runs import HOSTILE

from compresskit.report.markup import preformatted, section, shown, table


def test_every_text_stays_a_text() -> None:
    html = section(HOSTILE, table([HOSTILE, "b"], [[HOSTILE, HOSTILE]], HOSTILE), preformatted(HOSTILE, HOSTILE))
    tags: list[str] = []
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert {name for name, _ in attributes} <= {"role", "tabindex", "aria-label", "scope", "class"}

        def handle_data(self, data: str) -> None:
            texts.append(data)

    reader = Reader()
    reader.feed(html)
    reader.close()
    assert tags == ["section", "h2", "div", "table", "thead", "tr", "th", "th", "tbody", "tr", "th", "td", "h3", "pre"]
    assert texts.count(HOSTILE.replace("\x1b", " ")) == 6


def test_a_column_of_words_says_so_in_its_head_and_its_cells() -> None:
    html = table(["a", "b", "c"], [["1", "2", "3"]], "t", {"b"})
    assert html.count('class="words"') == 2
    assert '<td class="words">2</td><td>3</td>' in html


def test_what_cannot_be_printed_is_a_space_but_for_line_ends() -> None:
    assert shown("a\x00\u202eb\nc<") == "a  b\nc&lt;"
