"""Print the evaluate report as a small table, and answers below each other."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from compresskit.numerics.units import readable_bytes, readable_count

Row = tuple[str, str, str, str]
"""Metric, before, after, change."""
TERMINAL_COLUMNS = 100
INDENT = " " * 10


def table(report: dict[str, Any]) -> str:
    """Size, parameters, perplexity and speed; with a reference also the values before."""
    speed = report.get("speed") or {}
    quantities = [
        ("size on disk", "bytes", report, readable_bytes, None),
        ("parameters", "parameters", report, readable_count, None),
        ("perplexity (lower is better)", "perplexity", report, "{:.2f}".format, None),
        ("prefill tokens/s", "prefill_tokens_per_second", speed, "{:.1f}".format, speed.get("prefill_speedup")),
        ("decode tokens/s", "decode_tokens_per_second", speed, "{:.1f}".format, speed.get("decode_speedup")),
        ("memory when running", "peak_memory_bytes", speed, readable_bytes, None),
    ]
    rows: list[Row] = [("", "before", "after", "change") if report.get("against") else ("", "", "value", "")]
    for name, key, values, form, factor in quantities:
        before, after = values.get(f"reference_{key}"), values.get(key)
        if after is None:
            continue
        change = factor or (after / before if before else None)
        shown_before, shown_after = (form(value) if value else "" for value in (before, after))
        rows.append((name, shown_before, shown_after, f"x {change:.3f}" if change else ""))
    if report.get("kl") is not None:
        rows.append(("KL to the original, nats a token", "", f"{report['kl']:.4f}", ""))
    if report.get("top1_agreement") is not None:
        rows.append(("same most likely token", "", f"{report['top1_agreement']:.1%}", ""))
    if report.get("bits_per_byte") is not None and not report.get("against"):
        rows.append(("bits a byte of text", "", f"{report['bits_per_byte']:.4f}", ""))
    rows += [(f"task {name}", "", shown_score(score), "") for name, score in (report.get("tasks") or {}).items()]
    return aligned(rows) + f"\nmeasured on: {report['text']}"


def shown_score(score: float | dict[str, float]) -> str:
    """A task's score, or its scores by name."""
    return f"{score:.1%}" if isinstance(score, (int, float)) else ", ".join(f"{k} {v:.4g}" for k, v in score.items())


def answers(report: dict[str, Any], most: int | None = None) -> str:
    """The first questions (all, if `most` is None) with the answers before and after; "" where none were asked."""
    lines: list[str] = []
    for each in (report.get("generations") or [])[:most]:
        lines += ["", *_wrapped("", each["prompt"])]
        before = each.get("before")
        lines += _wrapped("  before", before) if before is not None else []
        lines += _wrapped("  after" if before is not None else "  answer", each["after"])
    return "\n".join(lines[1:])


def _wrapped(label: str, text: str) -> list[str]:
    """Lines of a terminal with a label before the first; the text's own line ends become spaces."""
    start = label.ljust(len(INDENT)) if label else ""
    rest = INDENT if label else ""
    found = textwrap.wrap(" ".join(text.split()), TERMINAL_COLUMNS, initial_indent=start, subsequent_indent=rest)
    return found or [f"{start}(nothing)"]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the first column left and the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
