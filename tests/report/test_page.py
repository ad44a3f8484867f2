"""The page is one file that needs nothing else, its charts are drawn, and its text can be read.

Oracles: an HTML parser, WCAG's contrast formula, and, where there is one, a real browser with axe-core.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from compresskit.cli.main import main
from compresskit.errors import RequestError
from compresskit.recipe.reading import load
from compresskit.recipe.run import run
from compresskit.report import charts
from compresskit.report.collecting import read_result
from compresskit.report.page import STYLE
from compresskit.report.writing import write_reports

TEXT = """
source: {source}
defaults: {{calibration: {text}, samples: 8, sequence_length: 64}}
matrix: {{bits: [3, 4]}}
steps:
  - {{prune: cfsp, sparsity: 0.25, round_to: 8}}
  - {{quantize: apiq, bits: "${{bits}}", group_size: 8, epochs: 1}}
  - {{compensate: eora, original: prune, rank: 2}}
  - {{evaluate: , against: source, data: {text}, windows: 2}}
gates: [size_ratio<=1, perplexity_ratio<=1e-9]
"""
BROWSER = Path(__file__).parent / "browser.mjs"
LARGEST_PAGE = 3_000_000
LEAST_CONTRAST = 4.5


@pytest.fixture(scope="module")
def out(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("report")
    recipe = folder / "whole-path.yaml"
    recipe.write_text(TEXT.format(source=tiny["llama"], text=text_file))
    result = run(load(recipe), folder / "out")
    write_reports(folder / "out", result)
    return folder / "out"


class Reader(HTMLParser):
    """Open tags, attributes that load something, and marks by chart."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.marks: list[int] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag == "figure":
            self.marks.append(0)
        if tag in ("rect", "circle", "path"):
            self.marks[-1] += 1
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> Reader:
    reader = Reader()
    reader.feed(path.read_text())
    reader.close()
    return reader


def test_the_page_is_one_small_file_that_loads_nothing(out: Path) -> None:
    page = out / "report.html"
    reader = read(page)
    assert reader.open == []
    assert page.stat().st_size < LARGEST_PAGE
    assert all(value.startswith("data:") for value in reader.loads)
    assert not re.search(r"url\(|@import|https?://|<script", page.read_text())


def test_every_chart_has_marks_and_every_part_is_there(out: Path) -> None:
    reader = read(out / "report.html")
    assert len(reader.marks) >= 10
    assert min(reader.marks) > 0
    for words in (
        "Before and after", "1 of 2", "MISSED", "Left and low is better", "FFN channels a block keeps", "before training",
        "Mean rank of a block's repair", "Provenance", "compresskit run", "PeftModel.from_pretrained", "vllm serve",
    ):  # fmt: skip
        assert words in reader.text.replace("2 of 4", "1 of 2"), words
    hashes = json.loads((out / "prune" / "compresskit.json").read_text())["outputs"]["sha256"]
    assert all(digest[:12] in reader.text for digest in hashes.values())


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_background_in_both_schemes(scheme: int) -> None:
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in STYLE.split("prefers-color-scheme: dark")[:2])
    colours = light if scheme == 0 else {**light, **dark}
    for text in ("ink", "soft"):
        for background in ("paper", "panel"):
            high, low = sorted((luminance(colours[text]), luminance(colours[background])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= LEAST_CONTRAST, (text, background)


def test_a_name_cannot_break_out_of_the_page() -> None:
    drawn = charts.bars("<b>", ["<script>"], [charts.Series("&", [1.0])], ("<i>", '"'))
    assert "<script>" not in drawn
    assert "<b>" not in drawn


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0), (3, 3), (-2, 5), (1e-9, 3e-9), (0.999, 1.001), (1e6, 7e8)])
def test_ticks_are_few_ascending_and_cover_the_values(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found == sorted(set(found))
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


def test_the_model_card_has_metadata_that_the_hub_reads(out: Path) -> None:
    card = (out / "compensate-bits-4" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    metadata: dict[str, Any] = yaml.safe_load(head)
    assert metadata["library_name"] == "peft"
    assert metadata["tags"] == ["compresskit", "eora", "apiq", "cfsp"]
    metric = metadata["model-index"][0]["results"][0]["metrics"][0]
    assert metric["type"] == "perplexity"
    assert metric["value"] > 1
    assert "prune cfsp, then quantize apiq, then compensate eora" in body
    assert f"PeftModel.from_pretrained(model, '{out}/compensate-bits-4')" in body


def test_the_command_writes_the_page_anew(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    with pytest.raises(SystemExit) as caught:
        main(["report", str(out)])
    assert not caught.value.code
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    assert (out / "report.html").read_text() == before


def test_a_folder_without_a_run_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(RequestError, match="holds no finished run"):
        read_result(tmp_path)
    with pytest.raises(RequestError, match="is the report of one step"):
        read_result(out / "evaluate-bits-3")


@pytest.fixture
def browser_packages(request: pytest.FixtureRequest) -> Path:
    """A folder with headless Chromium and axe-core, installed by npm once, from the lock file, into pytest's cache."""
    if shutil.which("npm") is None:
        pytest.skip("there is no npm to install headless Chromium and axe-core with")
    folder = request.config.cache.mkdir("browser")
    locked = (BROWSER.parent / "package-lock.json").read_bytes()
    installed = folder / "node_modules" / "package-lock.json"
    if not installed.exists() or installed.read_bytes() != locked:
        for name in ("package.json", "package-lock.json"):
            shutil.copy(BROWSER.parent / name, folder)
        finished = subprocess.run(["npm", "ci", "--ignore-scripts"], cwd=folder, capture_output=True, text=True, check=False)
        if finished.returncode:
            pytest.skip(f"npm ci in {BROWSER.parent} failed: {finished.stderr.strip()}")
        installed.write_bytes(locked)
    return folder


def test_a_browser_finds_no_fault(out: Path, tmp_path: Path, browser_packages: Path) -> None:
    command = ["node", BROWSER, browser_packages, out / "report.html", tmp_path / "shot"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stderr
    found = json.loads(finished.stdout)
    assert (found["console"], found["requests"]) == ([], [])
    assert [(view["scheme"], view["width"]) for view in found["views"]] == [
        ("light", 390), ("light", 1280), ("dark", 390), ("dark", 1280),
    ]  # fmt: skip
    for view in found["views"]:
        assert view["violations"] == []
        assert view["overflow"] == 0
        assert min(view["charts"]) > 0
