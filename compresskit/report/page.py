"""The report of a run: one HTML file without scripts or network, for screens, phones and paper, and the model card beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compresskit import __version__
from compresskit.checkpoint.whole_files import write_whole
from compresskit.checkpoint.work_folder import MANIFEST
from compresskit.errors import RequestError
from compresskit.numerics.units import readable_bytes
from compresskit.recipe import verdict
from compresskit.recipe.steps import STEP_NAME
from compresskit.report import charts, collecting
from compresskit.report.answers import answers
from compresskit.report.card import card
from compresskit.report.figures import before_after, tiles, tradeoff
from compresskit.report.front import front
from compresskit.report.markup import preformatted, section, shown, table
from compresskit.report.reference_points import References
from compresskit.report.serving import commands, shell

PAGE = "report.html"
CARD = "README.md"
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
LARGEST_CHARTS = 2_000_000
"""Characters of all charts of blocks: a run of many steps still gives a page that opens at once."""
BLOCK_CHARTS = {
    "widths": ("FFN channels a block keeps", "channels"),
    "importance": ("Importance of a block", "angular distance"),
    "bits": ("Bits of a block", "bits"),
    "rank": ("Mean rank of a block's repair", "rank"),
    "error": ("Error of a block's output", "error"),
}


def write_reports(out: Path, result: Mapping[str, Any], references: References = {}) -> Path:  # noqa: B006
    """Rewrite the page, and the card of the final model. `references`: others' points for the chart of size and quality.

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
    write_whole(out / PAGE, page(out, result, references))
    if final is not None:
        write_whole(out / final / CARD, card(out, result, final))
    return out / PAGE


def page(out: Path, result: Mapping[str, Any], references: References = {}) -> str:  # noqa: B006
    """Build the HTML page of a run's folder."""
    sentence = verdict.sentence(dict(result))
    made = collecting.manifests(out, result)
    title = Path(result["recipe"]).stem
    report = verdict.last_report(dict(result)) or {}
    sections = [
        _gates(result),
        f'<div class="pair">{before_after(result)}{tradeoff(result, references)}</div>',
        answers(report),
        _serve(out, result),
        _fitting([_step(name, each) for name, each in made.items()]),
        _steps(result),
        _provenance(result, made),
    ]
    passed = "" if not result["gates"] else ' class="good"' if result["passed"] else ' class="bad"'
    warned = f'<p id="warning">{shown(report["warning"])}</p>' if report.get("warning") else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{shown(title)}: compresskit report</title><style>{STYLE}</style></head><body><main>"
        f"<header><p>compresskit {shown(__version__)}: {shown(title)}</p>"
        f'<h1{passed} id="verdict">{shown(sentence[:1].upper() + sentence[1:])}</h1>{warned}{tiles(result)}</header>'
        f"{''.join(sections)}</main></body></html>\n"
    )


def _gates(result: Mapping[str, Any]) -> str:
    if not result["gates"]:
        return ""
    return section("Gates", table(("gate", "found", "verdict", "missed by"), verdict.gate_rows(dict(result)), "Gates"))


def _steps(result: Mapping[str, Any]) -> str:
    rows = []
    for name, step in result["steps"].items():
        if step is None:
            continue
        weight = step.get("bytes_after", step.get("bytes"))
        seconds, memory = step.get("seconds"), step.get("peak_memory_bytes")
        rows.append((
            name, f"{step['stage']} {step.get('method') or ''}".strip(), "" if weight is None else readable_bytes(weight),
            _quality(step),
            "" if seconds is None else f"{seconds:.0f} s", "" if not memory else readable_bytes(memory),
        ))  # fmt: skip
    return section("Steps", table(("step", "what", "size", "quality", "time", "peak memory"), rows, "Steps", {"what"}))


def _quality(step: Mapping[str, Any]) -> str:
    """What a step says of its result: perplexity where it evaluates, else the KL divergence on held-back text."""
    if step.get("perplexity") is not None:
        ratio = step.get("perplexity_ratio")
        return f"perplexity {step['perplexity']:.2f}" + (f" (x {ratio:.3f})" if ratio else "")
    if step.get("kl_before") is not None and step.get("kl_after") is not None:
        return f"KL {step['kl_before']:.4f} to {step['kl_after']:.4f}"
    return "" if step.get("kl_held_back") is None else f"KL {step['kl_held_back']:.4f}"


def _step(name: str, manifest: Mapping[str, Any]) -> str:
    """The charts of one step."""
    facts = manifest.get("facts") or {}
    return front(name, facts) + _blocks(name, manifest) + _recovery(name, facts)


def _blocks(name: str, manifest: Mapping[str, Any]) -> str:
    drawn = []
    for key, series in collecting.per_block(manifest.get("facts") or {}).items():
        title, axis = BLOCK_CHARTS[key]
        count = len(next(iter(series.values())))
        named = [charts.Series(label or axis, values) for label, values in series.items()]
        drawn.append(charts.bars(title, [str(i) for i in range(count)], named, ("block", axis)))
    title = f"{name}: {manifest['stage']} {manifest['method']}, block by block"
    return section(title, f'<div class="charts">{"".join(drawn)}</div>') if drawn else ""


def _fitting(steps: Sequence[str]) -> str:
    """The charts of as many steps as a page can hold, and how many were left out."""
    found, used = [], 0
    for each in steps:
        if used + len(each) <= LARGEST_CHARTS:
            found.append(each)
            used += len(each)
    left_out = len(steps) - len(found)
    note = f"The charts of {left_out} further steps are left out; their folders' {MANIFEST} hold the figures."
    return "".join(found) + (section("Further steps", f"<p>{note}</p>") if left_out else "")


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
    return section(f"{name}: recovery", f'<div class="charts">{"".join(drawn)}</div>') if drawn else ""


def _provenance(result: Mapping[str, Any], made: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, manifest in made.items():
        inputs = ", ".join(digest[:12] for digest in (manifest.get("inputs") or {}).get("sha256", {}).values())
        hashes = (manifest.get("outputs") or {}).get("sha256", {})
        outputs = ", ".join(f"{file} {digest[:12]}" for file, digest in hashes.items())
        rows.append((name, f"{manifest['stage']} {manifest['method']}", inputs, outputs))
    source = f"<p>Source: <code>{shown(result['source'])}</code>. First 12 digits of each weight file's SHA-256.</p>"
    places = [shell(result[key]) for key in ("recipe", "output", "source")]
    again = preformatted("Run it again", "compresskit run {} {} --source {}".format(*places))
    listed = table(("step", "made by", "from", "gave"), rows, "Provenance", {"made by", "from", "gave"}) if rows else ""
    return section("Provenance", source, listed, again)


def _serve(out: Path, result: Mapping[str, Any]) -> str:
    final = collecting.final_model(out, result)
    if not final:
        return ""
    return section("Use it", *(preformatted(title, text) for title, text in commands(out / final).items()))
