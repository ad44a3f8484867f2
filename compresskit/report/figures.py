"""The figures of a run on the page: tiles to see at once, the table of before and after, the chart of size and quality."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from compresskit.evaluation.table import shown_score
from compresskit.numerics.units import readable_bytes, readable_count
from compresskit.report import charts, collecting
from compresskit.report.markup import section, shown, table
from compresskit.report.reference_points import References

RELATIVE = {"perplexity_ratio": "perplexity over the original's", "perplexity": "perplexity"}


class Tile(NamedTuple):
    """One figure of the last evaluation."""

    name: str
    value: str
    note: str


def tiles(result: Mapping[str, Any]) -> str:
    """The figures that a reader looks for first; "" where nothing was measured."""
    found = collecting.measured(result)
    if not found:
        return ""
    boxes = (
        f"<div><dt>{shown(each.name)}</dt><dd>{shown(each.value)}<small>{shown(each.note)}</small></dd></div>"
        for each in _tiles(found[-1].report)
    )
    return f'<dl class="tiles">{"".join(boxes)}</dl>'


def _tiles(report: Mapping[str, Any]) -> Iterator[Tile]:
    before = report.get("reference_bytes")
    yield Tile(
        "Size", readable_bytes(report["bytes"]), f"was {readable_bytes(before)}" if before is not None else "of the weights"
    )
    before = report.get("reference_perplexity")
    yield Tile("Perplexity", f"{report['perplexity']:.2f}", f"was {before:.2f}" if before is not None else "lower is better")
    if report.get("top1_agreement") is not None:
        yield Tile("Same next token", f"{report['top1_agreement']:.1%}", "as the original's most likely")
    speed = report.get("speed") or {}
    if speed.get("decode_tokens_per_second") is not None:
        before = speed.get("reference_decode_tokens_per_second")
        note = f"tokens a second, were {before:.1f}" if before is not None else "tokens a second"
        yield Tile("Decoding", f"{speed['decode_tokens_per_second']:.1f}", note)
    elif report.get("bits_per_weight") is not None:
        yield Tile("Stored bits", f"{report['bits_per_weight']:.2f}", "a weight, embedding included")


def before_after(result: Mapping[str, Any]) -> str:
    """Every figure of the last evaluation; "" where nothing was measured."""
    found = collecting.measured(result)
    if not found:
        return ""
    report = found[-1].report
    speed = report.get("speed") or {}
    rows = []
    quantities = (
        ("Size", "bytes", readable_bytes, report), ("Parameters", "parameters", readable_count, report),
        ("Perplexity (lower is better)", "perplexity", "{:.2f}".format, report),
        ("Prefill, tokens a second", "prefill_tokens_per_second", "{:.1f}".format, speed),
        ("Decoding, tokens a second", "decode_tokens_per_second", "{:.1f}".format, speed),
        ("Memory when running", "peak_memory_bytes", readable_bytes, speed),
    )  # fmt: skip
    for name, key, form, values in quantities:
        after, before = values.get(key), values.get(f"reference_{key}")
        if after is not None:
            factor = speed.get(f"{key.partition('_')[0]}_speedup") if values is speed else None  # a median of its own
            factor = factor or (after / before if before else None)
            change = f"x {factor:.3f}" if factor else ""
            rows.append((name, form(before) if before else "", form(after), change))
    for name, key, text in (
        ("Share of the original's 16-bit bytes", "size_ratio_16bit", "{:.1%}"),
        ("Stored bits a weight", "bits_per_weight", "{:.2f}"),
        ("KL to the original, nats a token", "kl", "{:.4f}"), ("Same most likely token", "top1_agreement", "{:.1%}"),
    ):  # fmt: skip
        if report.get(key) is not None:
            rows.append((name, "", text.format(report[key]), ""))
    rows += [(f"Task {name}", "", shown_score(score), "") for name, score in (report.get("tasks") or {}).items()]
    note = f"<p>Step {shown(found[-1].name)}, measured on: {shown(report['text'])} ({report['tokens']:,} tokens).</p>"
    return section("Before and after", table(("quantity", "before", "after", "change"), rows, "Before and after"), note)


def tradeoff(result: Mapping[str, Any], references: References) -> str:
    """Size against quality of all evaluated models, the original, and others' points; "" where nothing was measured."""
    found = collecting.measured(result)
    key = collecting.quality_key(result)
    if key is None:
        return ""
    points = [
        charts.Point(name, each.report["bytes"] / 1e6, each.report[key]) for name, each in zip(_names(found), found, strict=True)
    ]
    groups = ["this run"]
    original = found[0].report.get("reference_bytes")
    if key == "perplexity_ratio" and original is not None:
        points.append(charts.Point("original", original / 1e6, 1.0, 1))
        groups.append("original")
    for name, others in references.items():
        for each in others:
            title = f"{name} {each.get('name') or ''}".strip()
            points.append(charts.Point(title, each["bytes"] / 1e6, each[key], len(groups), is_joined=True))
        groups.append(name)
    drawn = charts.scatter("Left and low is better", points, ("size, MB", RELATIVE[key]), groups)
    rows = [(point.name, readable_bytes(point.x * 1e6), f"{point.y:.4g}") for point in points]
    listed = (
        table(("model", "size", key.replace("_", " ")), rows, "Size and quality")
        if len(rows) > len(("original", "result"))
        else ""
    )
    return section("Size and quality", drawn, listed)


def _names(found: list[collecting.Measured]) -> list[str]:
    """A name for each evaluation: the step whose model it measured, or its own where several measured that one."""
    models = [each.of for each in found]
    return [each.of if models.count(each.of) == 1 and each.of != "source" else each.name for each in found]
