"""The report of a run: one HTML file without scripts or network, for screens, phones and paper, and the model card beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from compresskit import __version__
from compresskit.checkpoint.whole_files import write_whole
from compresskit.errors import RequestError
from compresskit.numerics.units import readable_bytes
from compresskit.recipe import verdict
from compresskit.recipe.steps import STEP_NAME
from compresskit.report import charts, collecting
from compresskit.report.card import card
from compresskit.report.serving import commands, shell

PAGE = "report.html"
CARD = "README.md"
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
BLOCK_CHARTS = {
    "widths": ("FFN channels a block keeps", "channels"),
    "importance": ("Importance of a block", "angular distance"),
    "bits": ("Bits of a block", "bits"),
    "rank": ("Mean rank of a block's repair", "rank"),
    "error": ("Relative error of a block", "error"),
}


def write_reports(out: Path, result: Mapping[str, Any]) -> Path:
    """Rewrite the page, and the card of the final model.

    Returns:
        The page's path.

    Raises:
        RequestError: a step's name leads out of the run's folder.
    """
    for name in result["steps"]:
        if not STEP_NAME.fullmatch(name):
            raise RequestError(f"{out}: its report names the step {name!r}, which is no folder in it; run the recipe again")
    final = collecting.final_model(out, result)
    if final is not None and (out / final).is_symlink():
        raise RequestError(f"{out / final}: is a link, and its model card would be written elsewhere; move the folder here")
    write_whole(out / PAGE, page(out, result))
    if final is not None:
        write_whole(out / final / CARD, card(out, result, final))
    return out / PAGE


def page(out: Path, result: Mapping[str, Any]) -> str:
    """Build the HTML page of a run's folder."""
    sentence = verdict.sentence(dict(result))
    made = collecting.manifests(out, result)
    title = Path(result["recipe"]).stem
    sections = [
        _before_after(result),
        _gates(result),
        _tradeoff(result),
        _steps(result),
        *(_blocks(name, manifest) for name, manifest in made.items()),
        *(_recovery(name, manifest.get("facts") or {}) for name, manifest in made.items()),
        _provenance(result, made),
        _commands(out, result),
    ]
    passed = "" if not result["gates"] else ' class="good"' if result["passed"] else ' class="bad"'
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}: compresskit report</title><style>{STYLE}</style></head><body><main>"
        f"<header><p>compresskit {escape(__version__)}</p><h1>{escape(title)}</h1>"
        f'<p{passed} id="verdict">{escape(sentence)}</p></header>'
        f"{''.join(sections)}</main></body></html>\n"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    label = f'role="region" tabindex="0" aria-label="{escape(caption)}"'
    return f'<div class="table" {label}><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, *content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(content)}</section>"


def _before_after(result: Mapping[str, Any]) -> str:
    found = collecting.measured(result)
    if not found:
        return ""
    report = found[-1].report
    speed = report.get("speed") or {}
    rows = []
    quantities = (
        ("Size", "bytes", 1e6, " MB", report), ("Parameters", "parameters", 1e6, " M", report),
        ("Perplexity (lower is better)", "perplexity", 1, "", report),
        ("Prefill, tokens a second", "prefill_tokens_per_second", 1, "", speed),
        ("Decoding, tokens a second", "decode_tokens_per_second", 1, "", speed),
        ("Memory when running", "peak_memory_bytes", 1e6, " MB", speed),
    )  # fmt: skip
    for name, key, unit, suffix, values in quantities:
        after, before = values.get(key), values.get(f"reference_{key}")
        if after is not None:
            change = f"x {after / before:.3f}" if before else ""
            rows.append((name, f"{before / unit:.2f}{suffix}" if before else "", f"{after / unit:.2f}{suffix}", change))
    for name, key, form in (
        ("Share of the original's 16-bit bytes", "size_ratio_16bit", "{:.1%}"),
        ("Stored bits a weight", "bits_per_weight", "{:.2f}"),
        ("KL to the original, nats a token", "kl", "{:.4f}"), ("Same most likely token", "top1_agreement", "{:.1%}"),
    ):  # fmt: skip
        if report.get(key) is not None:
            rows.append((name, "", form.format(report[key]), ""))
    rows += [(f"Task {name}", "", _task(score), "") for name, score in (report.get("tasks") or {}).items()]
    note = f"<p>Step {escape(found[-1].name)}, measured on: {escape(report['text'])} ({report['tokens']:,} tokens).</p>"
    return _section("Before and after", _table(("quantity", "before", "after", "change"), rows, "Before and after"), note)


def _task(score: Any) -> str:
    return f"{score:.1%}" if isinstance(score, (int, float)) else ", ".join(f"{k} {v:.4g}" for k, v in score.items())


def _gates(result: Mapping[str, Any]) -> str:
    if not result["gates"]:
        return ""
    return _section("Gates", _table(("gate", "found", "verdict", "missed by"), verdict.gate_rows(dict(result)), "Gates"))


def _tradeoff(result: Mapping[str, Any]) -> str:
    found = collecting.measured(result)
    if not found:
        return ""
    relative = all(each.report.get("perplexity_ratio") for each in found)
    key = "perplexity_ratio" if relative else "perplexity"
    points = [charts.Point(each.name, each.report["bytes"] / 1e6, each.report[key]) for each in found]
    groups = ["evaluated models"]
    if relative and found[0].report.get("reference_bytes") is not None:
        points.append(charts.Point("original", found[0].report["reference_bytes"] / 1e6, 1.0, 1))
        groups.append("original")
    axis = "perplexity over the original's" if relative else "perplexity"
    return _section("Size and quality", charts.scatter("Left and low is better", points, ("size, MB", axis), groups))


def _steps(result: Mapping[str, Any]) -> str:
    rows = []
    for name, step in result["steps"].items():
        if step is None:
            continue
        size = step.get("bytes_after", step.get("bytes"))
        seconds, memory = step.get("seconds"), step.get("peak_memory_bytes")
        rows.append((
            name, f"{step['stage']} {step.get('method') or ''}".strip(), "" if size is None else readable_bytes(size),
            "" if seconds is None else f"{seconds:.0f} s", "" if not memory else readable_bytes(memory),
        ))  # fmt: skip
    return _section("Steps", _table(("step", "what", "size", "time", "peak memory"), rows, "Steps"))


def _blocks(name: str, manifest: Mapping[str, Any]) -> str:
    drawn = []
    for key, series in collecting.per_block(manifest.get("facts") or {}).items():
        title, axis = BLOCK_CHARTS[key]
        count = len(next(iter(series.values())))
        shown = [charts.Series(label or axis, values) for label, values in series.items()]
        drawn.append(charts.bars(title, [str(i) for i in range(count)], shown, ("block", axis)))
    title = f"{name}: {manifest['stage']} {manifest['method']}, block by block"
    return _section(title, f'<div class="charts">{"".join(drawn)}</div>') if drawn else ""


def _recovery(name: str, facts: Mapping[str, Any]) -> str:
    drawn = []
    clusters = [each for each in collecting.listed(facts.get("clusters")) if isinstance(each, Mapping)]
    series = [
        charts.Series(key, [collecting.number(cluster.get(key)) for cluster in clusters])
        for key in ("share", "taken", "count", "selected", "size", "samples")
    ]
    series = [each for each in series if each.values and None not in each.values]
    if series:
        names = [str(cluster.get("name", index)) for index, cluster in enumerate(clusters)]
        drawn.append(charts.bars("The selection's clusters", names, series, ("cluster", "samples")))
    losses = [collecting.number(loss) for loss in collecting.listed(facts.get("losses"))]
    points = [(float(i), loss) for i, loss in enumerate(losses, start=1) if loss is not None]
    if len(points) > 1:
        drawn.append(charts.line("Training loss", points, ("step", "loss")))
    return _section(f"{name}: recovery", f'<div class="charts">{"".join(drawn)}</div>') if drawn else ""


def _provenance(result: Mapping[str, Any], made: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, manifest in made.items():
        inputs = ", ".join(digest[:12] for digest in (manifest.get("inputs") or {}).get("sha256", {}).values())
        hashes = (manifest.get("outputs") or {}).get("sha256", {})
        outputs = ", ".join(f"{file} {digest[:12]}" for file, digest in hashes.items())
        rows.append((name, f"{manifest['stage']} {manifest['method']}", inputs, outputs))
    source = f"<p>Source: <code>{escape(str(result['source']))}</code>. First 12 digits of each weight file's SHA-256.</p>"
    return _section("Provenance", source, _table(("step", "made by", "from", "gave"), rows, "Provenance")) if rows else ""


def _commands(out: Path, result: Mapping[str, Any]) -> str:
    places = [shell(result[key]) for key in ("recipe", "output", "source")]
    again = "compresskit run {} {} --source {}".format(*places)
    final = collecting.final_model(out, result)
    parts = [f'<h3>Reproduce</h3><pre tabindex="0">{escape(again)}</pre>']
    for title, text in (commands(out / final) if final else {}).items():
        parts.append(f'<h3>{escape(title)}</h3><pre tabindex="0">{escape(text)}</pre>')
    return _section("Reproduce and serve", *parts)
