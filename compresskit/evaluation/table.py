"""Print the evaluate report as a small table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = tuple[str, str, str, str]
"""Metric, before, after, change."""


def table(report: dict[str, Any]) -> str:
    """Size, parameters, perplexity and speed; with a reference also the values before."""
    speed = report["speed"] or {}
    quantities = [
        ("size on disk", "bytes", report, 1e6, 1, " MB", None),
        ("parameters", "parameters", report, 1e6, 1, " M", None),
        ("perplexity (lower is better)", "perplexity", report, 1, 2, "", None),
        ("prefill tokens/s", "prefill_tokens_per_second", speed, 1, 1, "", speed.get("prefill_speedup")),
        ("decode tokens/s", "decode_tokens_per_second", speed, 1, 1, "", speed.get("decode_speedup")),
        ("memory when running", "peak_memory_bytes", speed, 1e6, 0, " MB", None),
    ]
    rows: list[Row] = [("", "before", "after", "change") if report["against"] else ("", "", "value", "")]
    for name, key, values, unit, digits, suffix, factor in quantities:
        if key not in values:
            continue
        before, after = values.get(f"reference_{key}"), values[key]
        change = factor or (after / before if before else None)
        shown_before, shown_after = (f"{value / unit:.{digits}f}{suffix}" if value else "" for value in (before, after))
        rows.append((name, shown_before, shown_after, f"x {change:.3f}" if change else ""))
    if report["kl"] is not None:
        rows.append(("KL to the original, nats a token", "", f"{report['kl']:.4f}", ""))
        rows.append(("same most likely token", "", f"{report['top1_agreement']:.1%}", ""))
    rows += [(f"task {name}", "", f"{score:.1%}", "") for name, score in (report.get("tasks") or {}).items()]
    return aligned(rows) + f"\nmeasured on: {report['text']}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align the first column left and the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)
