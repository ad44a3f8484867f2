"""Parts of the page's HTML: sections, tables, and texts of strangers as texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape


def shown(text: object) -> str:
    """A text as HTML that shows it, whatever it holds; what cannot be printed, line ends aside, is a space."""
    return escape("".join(each if each.isprintable() or each == "\n" else " " for each in str(text)))


def section(title: str, *content: str, name: str = "") -> str:
    """A part of the page with its heading; `name` is a class."""
    kind = f' class="{name}"' if name else ""
    return f"<section{kind}><h2>{shown(title)}</h2>{''.join(content)}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, words: Collection[str] = ()) -> str:
    """A table that scrolls in itself where the screen is narrow; the first cell of a row is its heading.

    `words`: the heads of columns that hold words, where the others hold numbers.

    Returns:
        The HTML, of which every cell is escaped.
    """
    kinds = [' class="words"' if cell in words else "" for cell in head]
    heads = "".join(f'<th scope="col"{kind}>{shown(cell)}</th>' for cell, kind in zip(head, kinds, strict=True))
    body = "".join(
        f'<tr><th scope="row">{shown(row[0])}</th>'
        + "".join(f"<td{kind}>{shown(cell)}</td>" for cell, kind in zip(row[1:], kinds[1:], strict=True))
        + "</tr>"
        for row in rows
    )
    label = f'role="region" tabindex="0" aria-label="{shown(caption)}"'
    return f'<div class="table" {label}><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def preformatted(title: str, text: str) -> str:
    """A command or program under its heading, to be copied."""
    return f'<h3>{shown(title)}</h3><pre tabindex="0" role="region" aria-label="{shown(title)}">{shown(text)}</pre>'
