"""recipe/verdict.py: gates decide the exit code, and CI reads them. End to end; oracles: parsers of XML and of Markdown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from recipe_runs import Make

from compresskit.cli.main import main
from compresskit.recipe import verdict


def test_gates_decide_the_exit_code_and_ci_reads_them(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(verdict.SUMMARY_VARIABLE, str(tmp_path / "summary.md"))
    path = make()
    out, xml = str(tmp_path / "out"), tmp_path / "junit.xml"
    for limit, code in (("50", 0), ("0.01", 3)):
        path.write_text(make().read_text().replace("perplexity_ratio<=50", f"perplexity_ratio<={limit}"))
        with pytest.raises(SystemExit) as caught:
            main(["run", str(path), out, "--junit", str(xml), "--json"])
        assert (caught.value.code or 0) == code
    output = capsys.readouterr()
    assert "evaluate: perplexity_ratio<=0.01, found" in output.err
    assert "MISSED" in output.err
    assert output.err.index("perplexity (lower is better)") < output.err.index("gates missed")
    assert [json.loads(line)["stage"] for line in output.out.splitlines()] == ["run", "run"]
    suite = ElementTree.parse(xml).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")
    assert "missed by" in suite.findall(".//failure")[0].get("message", "")
    html = MarkdownIt().enable("table").render((tmp_path / "summary.md").read_text())
    assert html.count("<table>") == 4
    assert '<td style="text-align:right">MISSED</td>' in html


def test_the_verdict_says_size_speed_loss_and_gates_in_one_sentence() -> None:
    report = {
        "stage": "evaluate", "bytes": 40e6, "size_ratio_16bit": 0.4, "perplexity": 20.0 * math.exp(0.08), "perplexity_ratio":
        math.exp(0.08), "reference_perplexity": 20.0, "speed": {"decode_speedup": 1.26},
    }  # fmt: skip
    gates = [{"passed": True}, {"passed": True}]
    assert verdict.sentence({"steps": {"e": report}, "gates": gates}) == (
        "2.5 times smaller than the original in 16 bits (40.0 MB), decodes 1.26 times as fast, loses 0.08 nats a token "
        "(perplexity from 20.00 to 21.67), all 2 gates met."
    )
    better = report | {"perplexity_ratio": math.exp(-0.5), "size_ratio_16bit": 2.0, "perplexity": 12.13}
    better["speed"] = {"decode_speedup": 0.826}
    assert verdict.sentence({"steps": {"e": better}, "gates": []}) == (
        "2.0 times as large as the original in 16 bits (40.0 MB), decodes at 83% of its speed, gains 0.5 nats a token "
        "(perplexity from 20.00 to 12.13)."
    )
    alone = {"stage": "evaluate", "bytes": 40e6, "perplexity": 20.0}
    assert verdict.sentence({"steps": {"e": alone}, "gates": gates[:1]}) == "40.0 MB, perplexity 20.00, all 1 gates met."
    assert verdict.sentence({"steps": {"e": None}, "gates": []}) == "1 steps, nothing evaluated."


def test_a_run_ends_with_what_was_measured_and_two_answers() -> None:
    asked = [{"prompt": f"question {i}?", "before": f"old {i}", "after": f"new {i}"} for i in range(3)]
    report = {"stage": "evaluate", "bytes": 2e6, "reference_bytes": 4e6, "against": "m", "perplexity": 3.0, "text": "prose"}
    shown = verdict.ending({"steps": {"e": report | {"generations": asked}}})
    assert shown.splitlines()[0].split() == ["before", "after", "change"]
    assert [line for line in shown.splitlines() if "question" in line] == ["question 0?", "question 1?"]
    assert "  before  old 1\n  after   new 1" in shown
    assert verdict.ending({"steps": {"prune": {"stage": "prune"}}}) == ""


@pytest.mark.parametrize("text", ["<b>*x*</b>", "a|b\n|c|", "`x`", "[l](j:x)", "![i](u)", "\\<i>", "a\x00\x1b[2J\ufffe", "- x"])
def test_texts_from_files_stay_texts_in_the_summary_and_in_the_xml(text: str) -> None:
    gate = {"step": "e", "metric": text, "operator": "<=", "limit": 1.0, "value": 2.0, "passed": False, "missed_by": 1.0}
    report = {"stage": "evaluate", "text": text, "tokens": 3, "bytes": 5, "perplexity": 2.0, "seconds": 1.0}
    result = {"steps": {"e": report}, "gates": [gate], "seconds": 1.0}

    def shown(line: str) -> str:
        return "".join(each if each.isprintable() else " " for each in line)

    tokens = MarkdownIt().enable("table").parse(verdict.markdown(result))
    texts = ["".join(each.content for each in token.children or []) for token in tokens if token.type == "inline"]
    kinds = {each.type for token in tokens for each in token.children or []}
    assert kinds <= {"text", "text_special"}
    assert texts[-1] == shown(f"Measured on: {text}, 3 tokens.")
    assert shown(f"e: {text} <= 1") in texts
    root = ElementTree.fromstring(verdict.junit(result))
    assert [case.get("name") for case in root.iter("testcase")] == ["e", shown(f"e: {text}<=1")]
