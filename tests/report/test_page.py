"""report/page.py: one file that needs nothing else, whose text can be read.

Oracles: an HTML parser, WCAG's contrast formula, and, where there is one, a real browser with axe-core.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hostile_runs import hostile_run

from compresskit.cli.main import main
from compresskit.errors import RequestError
from compresskit.report import page as pages
from compresskit.report.page import STYLE, write_reports

BROWSER = Path(__file__).parent / "browser.mjs"
LARGEST_PAGE = 3_000_000
LEAST_CONTRAST = 4.5


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
        "Mean rank of a block's repair", "Answers before and after", "1 more question",
        "Provenance", "compresskit run", "PeftModel.from_pretrained", "vllm serve",
    ):  # fmt: skip
        assert words in reader.text.replace("2 of 4", "1 of 2"), words
    steps = json.loads((out / "report.json").read_text())["steps"]
    repair, measured = steps["compensate-bits-4"], steps["evaluate-bits-4"]
    assert f"KL {repair['kl_before']:.4f} to {repair['kl_after']:.4f}" in reader.text
    assert f"perplexity {measured['perplexity']:.2f} (x {measured['perplexity_ratio']:.3f})" in reader.text
    hashes = json.loads((out / "prune" / "compresskit.json").read_text())["outputs"]["sha256"]
    assert all(digest[:12] in reader.text for digest in hashes.values())


def test_the_page_begins_with_the_verdict_and_its_figures(out: Path) -> None:
    text = (out / "report.html").read_text()
    report = json.loads((out / "report.json").read_text())["steps"]["evaluate-bits-4"]
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", text)
    assert heading
    assert heading[1].startswith(f"{report['size_ratio_16bit']:.1f} times as large as the original in 16 bits (")
    assert heading[1].endswith("2 of 4 gates missed.")
    assert text.index("<h1") < text.index('class="tiles"') < text.index("<h2")


def test_the_same_run_gives_the_same_page(out: Path) -> None:
    result = json.loads((out / "report.json").read_text())
    assert pages.page(out, result) == pages.page(out, result) == (out / "report.html").read_text()


def test_texts_from_files_stay_texts(tmp_path: Path) -> None:
    found = pages.page(tmp_path, hostile_run(tmp_path))
    reader = Reader()
    reader.feed(found)
    reader.close()
    assert reader.open == []
    assert all(value.startswith("data:") for value in reader.loads)
    assert "<script" not in found
    assert reader.text.count("<script>alert(1)</script>") > 5


@pytest.mark.parametrize("name", ["../mine", "/mine", "..", "a/b", ""])
def test_a_run_that_names_a_step_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    result = hostile_run(tmp_path / "out", "text")
    result["steps"][name] = result["steps"].pop("prune")
    with pytest.raises(RequestError, match="names the step"):
        write_reports(tmp_path / "out", result)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_card_is_written_through_a_link(tmp_path: Path) -> None:
    result = hostile_run(tmp_path / "out", "text")
    (tmp_path / "out" / "prune").rename(tmp_path / "mine")
    (tmp_path / "out" / "prune").symlink_to(tmp_path / "mine")
    with pytest.raises(RequestError, match="is a link"):
        write_reports(tmp_path / "out", result)
    assert not (tmp_path / "mine" / "README.md").exists()


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {}, ["x", None], [[1]], [{}, {}], [{"share": "a"}, {"share": 1}], [1e308, 1e308]]
)
def test_facts_of_another_kind_are_left_out(value: object, tmp_path: Path) -> None:
    result = hostile_run(tmp_path / "out", "text")
    manifest = tmp_path / "out" / "prune" / "compresskit.json"
    facts = dict.fromkeys(("losses", "clusters", "blocks", "widths"), value)
    manifest.write_text(json.dumps({"stage": "prune", "method": "cfsp", "facts": facts}))
    assert min(read(write_reports(tmp_path / "out", result)).marks) > 0


def test_a_run_of_many_steps_gives_a_page_that_is_small(tmp_path: Path) -> None:
    result = hostile_run(tmp_path, "text")
    manifest = {
        "stage": "prune",
        "method": "cfsp",
        "facts": {key: list(range(1, 101)) for key in ("widths", "bits", "importances")},
    }
    for number in range(80):
        name = f"step-{number}"
        (tmp_path / name).mkdir()
        (tmp_path / name / "compresskit.json").write_text(json.dumps(manifest))
        result["steps"][name] = {"stage": "prune", "method": "cfsp"}
    page = write_reports(tmp_path, result)
    drawn = len(read(page).marks)
    assert page.stat().st_size < LARGEST_PAGE
    assert 100 < drawn < 200
    assert "further steps are left out" in page.read_text()


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


def test_the_command_writes_the_page_anew(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (out / "report.html").read_text()
    (out / "report.html").unlink()
    with pytest.raises(SystemExit) as caught:
        main(["report", str(out)])
    assert not caught.value.code
    assert capsys.readouterr().out == f"{out / 'report.html'}\n"
    assert (out / "report.html").read_text() == before


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


@pytest.mark.slow
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
