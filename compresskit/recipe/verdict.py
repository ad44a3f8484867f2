"""Summarise a run for people and CI: a table of the gates, a Markdown job summary, JUnit XML."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

from compresskit.evaluation.gates import GateResult
from compresskit.evaluation.table import aligned, answers, table
from compresskit.numerics.units import readable_bytes

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
"""Environment variable in which GitHub Actions names the file of a job's summary."""
SHOWN_ANSWERS = 2
"""At the end of a run; the page shows all."""
Row = tuple[str, str, str, str]
MARKDOWN = re.compile(r"[\\`*_\[\]<>|~#!&]")
"""Characters that mean something inside a line of GitHub's Markdown."""
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
START = re.compile(r"^(\d*)([-+=.):])")
"""How a list or a heading's underline begins."""


def gate_rows(result: dict[str, Any]) -> list[Row]:
    """(gate, value, verdict, missed by) for every gate."""
    rows = []
    for gate in result["gates"]:
        found = "none" if gate.get("value") is None else f"{gate['value']:.4g}"
        missed = "" if not gate.get("missed_by") else f"{gate['missed_by']:.4g}"
        title = f"{gate['step']}: {gate['metric']} {gate['operator']} {gate['limit']:g}"
        rows.append((title, found, "met" if gate["passed"] else "MISSED", missed))
    return rows


def gate_table(result: dict[str, Any]) -> str:
    """Format the gates as a table."""
    return aligned([("gate", "found", "verdict", "missed by"), *gate_rows(result)])


def steps_rows(result: dict[str, Any]) -> list[Row]:
    """(step, size, perplexity against the original, time) for every finished step."""
    rows = []
    for name, found in result["steps"].items():
        if found is None:
            continue
        size = found.get("bytes", found.get("bytes_after"))
        ratio = found.get("perplexity_ratio")
        perplexity = found.get("perplexity")
        quality = "" if perplexity is None else f"{perplexity:.2f}"
        quality += f" (x {ratio:.3f})" if ratio else ""
        seconds = found.get("seconds")
        size_text = readable_bytes(size) if size is not None else ""
        rows.append((name, size_text, quality, "" if seconds is None else f"{seconds:.0f} s"))
    return rows


def sentence(result: dict[str, Any]) -> str:
    """State the verdict in one sentence: size, speed, loss, gates."""
    report = last_report(result)
    parts = [*_gained_and_lost(report)] if report else []
    missed = [gate for gate in result["gates"] if not gate["passed"]]
    if result["gates"]:
        parts.append(
            f"{len(missed)} of {len(result['gates'])} gates missed" if missed else f"all {len(result['gates'])} gates met"
        )
    return (", ".join(parts) or f"{len(result['steps'])} steps, nothing evaluated") + "."


def _gained_and_lost(report: dict[str, Any]) -> Iterator[str]:
    ratio = report.get("size_ratio_16bit") or 0
    size = readable_bytes(report["bytes"])
    if ratio > 0:
        change = f"{1 / ratio:.1f} times smaller than" if ratio < 1 else f"{ratio:.1f} times as large as"
        yield f"{change} the original in 16 bits ({size})"
    else:
        yield size
    speedup = (report.get("speed") or {}).get("decode_speedup")
    if speedup is not None:
        yield f"decodes {speedup:.2f} times as fast" if speedup >= 1 else f"decodes at {speedup:.0%} of its speed"
    ratio, before = report.get("perplexity_ratio") or 0, report.get("reference_perplexity")
    if ratio > 0:
        loss = math.log(ratio)
        was = "" if before is None else f"from {before:.2f} to "
        yield f"{'loses' if loss >= 0 else 'gains'} {abs(loss):.2g} nats a token (perplexity {was}{report['perplexity']:.2f})"
    else:
        yield f"perplexity {report['perplexity']:.2f}"


def ending(result: dict[str, Any]) -> str:
    """What was measured last, before and after, and two of the answers; "" where nothing was measured."""
    report = last_report(result)
    return f"{table(report)}\n\n{answers(report, SHOWN_ANSWERS)}".strip() if report else ""


def last_report(result: dict[str, Any]) -> dict[str, Any] | None:
    """Report of the last evaluate step, None if none ran."""
    reports = [found for found in result["steps"].values() if found and found.get("stage") == "evaluate"]
    return reports[-1] if reports else None


def markdown(result: dict[str, Any]) -> str:
    """Build the Markdown job summary."""
    lines = ["## compresskit", "", sentence(result), ""]
    lines += _table(("step", "size", "perplexity", "time"), steps_rows(result))
    if result["gates"]:
        lines += _table(("gate", "found", "verdict", "missed by"), gate_rows(result))
    report = last_report(result)
    if report:
        lines += [in_markdown(f"Measured on: {report['text']}, {report['tokens']} tokens."), ""]
    return "\n".join(lines)


def _table(head: Row, rows: list[Row]) -> list[str]:
    body = ["| " + " | ".join(in_markdown(cell) for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "| --- | ---: | ---: | ---: |", *body, ""]


def in_markdown(text: object) -> str:
    """Text from a file as one line of Markdown that shows it as it is, in a table's cell too."""
    escaped = MARKDOWN.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), one_line(text))
    return START.sub(r"\1\\\2", escaped)


def one_line(text: object) -> str:
    """Text from a file with a space for every character that cannot be printed."""
    return "".join(each if each.isprintable() else " " for each in str(text)).strip()


def junit(result: dict[str, Any]) -> str:
    """Build JUnit XML with a test case for each finished step and each gate."""
    missed = [gate for gate in result["gates"] if not gate["passed"]]
    steps = {name: found for name, found in result["steps"].items() if found is not None}
    attributes = {
        "name": "compresskit",
        "tests": str(len(steps) + len(result["gates"])),
        "failures": str(len(missed)),
        "errors": "0",
        "time": f"{result['seconds']:.3f}",
    }
    root = ElementTree.Element("testsuites", attributes)
    suite = ElementTree.SubElement(root, "testsuite", attributes)
    for name, found in steps.items():
        seconds = f"{found.get('seconds') or 0:.3f}"
        ElementTree.SubElement(suite, "testcase", classname="compresskit.steps", name=one_line(name), time=seconds)
    for gate in result["gates"]:
        shown = GateResult(**{key: value for key, value in gate.items() if key != "step"})
        title = one_line(f"{gate['step']}: {gate['metric']}{gate['operator']}{gate['limit']:g}")
        case = ElementTree.SubElement(suite, "testcase", classname="compresskit.gates", name=title, time="0")
        if not gate["passed"]:
            ElementTree.SubElement(case, "failure", message=one_line(shown), type="gate").text = one_line(shown)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"
