"""recipe/verdict.py: gates decide the exit code, and CI reads them. End to end; oracles: parsers of XML and of Markdown."""

from __future__ import annotations

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
    suite = ElementTree.parse(xml).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")
    assert "missed by" in suite.findall(".//failure")[0].get("message", "")
    html = MarkdownIt().enable("table").render((tmp_path / "summary.md").read_text())
    assert html.count("<table>") == 4
    assert '<td style="text-align:right">MISSED</td>' in html


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
