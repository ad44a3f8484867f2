"""docs/contributing.md does what it says: its examples run as they stand, its lists of files are those that run. End to end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from stock_tools import tokens
from transformers import AutoModelForCausalLM

from compresskit.api import stage

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
FILE = re.compile(r"^`(compresskit/[\w/]+\.py)`:\n\n```py\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MOST_FILES, MOST_LINES = 16, 2200
REQUESTS = ("prune cfsp", "quantize gptq", "compensate eora", "recover paser")
FOLDERS = {"prune": "pruning", "quantize": "quantization", "compensate": "compensation", "recover": "recovery"}
SMALL = {"samples": 4, "sequence_length": 32, "quiet": True}


def section(title: str) -> str:
    """The text of a section of the page, to the next heading of its level."""
    level = title.split(" ", 1)[0]
    return PAGE.partition(f"\n{title}\n")[2].split(f"\n{level} ")[0]


def block_after(text: str, sentence: str) -> str:
    """The first code block after a sentence."""
    return text.partition(sentence)[2].split("```py\n", 1)[1].split("```", 1)[0]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package, to be added to."""
    shutil.copytree(ROOT / "compresskit", tmp_path / "copy" / "compresskit", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "copy")
    return tmp_path / "copy"


def add_files(text: str, copy: Path) -> list[Path]:
    found = FILE.findall(text)
    for name, content in found:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text(content)
    return [copy / name for name, _ in found]


def edit(file: Path, before: str, after: str) -> None:
    text = file.read_text()
    assert text.count(before) == 1, before
    file.write_text(text.replace(before, after))


def command(copy: Path, *arguments: object) -> str:
    environment = os.environ | {"PYTHONPATH": str(copy)}
    call = [sys.executable, "-m", *map(str, arguments)]
    finished = subprocess.run(call, env=environment, cwd=copy, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_a_grid_quantiser_is_a_file_and_a_line(copy: Path, tiny: dict[str, Path], text_file: Path) -> None:
    text = section("## Add a grid quantiser")
    assert len(add_files(text, copy)) == 1
    line = block_after(text, 'The line in `METHODS["quantize"]`')
    edit(copy / "compresskit" / "methods.py", '        "rtn": Entry(', f'        {line.strip()}\n        "rtn": Entry(')
    common = (tiny["llama"], copy / "out", "--bits", 8, "--group-size", 8, "--calibration", text_file, "--sequence-length", 64)
    result = json.loads(command(copy, "compresskit", "quantize", "stochastic", *common, "--rounding-seed", 1, "--json"))
    assert result["method"] == "stochastic"
    assert result["kl_held_back"] < 0.01
    assert "stochastic" in command(copy, "compresskit", "methods")
    stock = AutoModelForCausalLM.from_pretrained(copy / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        assert bool(stock(tokens()).logits.isfinite().all())


@pytest.mark.slow
def test_a_stage_is_a_folder_and_four_entries(copy: Path, tiny: dict[str, Path]) -> None:
    text = section("## Add a stage")
    files = add_files(text, copy)
    assert {path.name for path in files} == {"__init__.py", "method.py", "half.py", "request.py", "run.py"}
    methods = copy / "compresskit" / "methods.py"
    edit(methods, '    "expand": Stage(', block_after(text, "The line in `STAGES`") + '    "expand": Stage(')
    edit(methods, '    "merge": {\n', block_after(text, "The block in `METHODS`") + '    "merge": {\n')
    edit(copy / "pyproject.toml", '"compresskit.calibration",', '"compresskit.calibration", "compresskit.casting",')
    edit(copy / "pyproject.toml", '"compresskit.pruning |', '"compresskit.casting | compresskit.pruning |')
    recipe = copy / "recipe.yaml"
    recipe.write_text(f"source: {tiny['llama']}\nsteps: [{{cast: half}}, {{quantize: nf4}}]\n")
    planned = json.loads(command(copy, "compresskit", "plan", recipe, "--no-probe", "--json"))["steps"]
    result = json.loads(command(copy, "compresskit", "cast", "half", tiny["llama"], copy / "out", "--json"))
    assert [row["title"] for row in planned] == ["cast half", "quantize nf4"]
    assert planned[0]["bytes"] == result["bytes_after"]
    stock = AutoModelForCausalLM.from_pretrained(copy / "out", dtype="auto").eval()
    assert stock.dtype == torch.bfloat16
    linter = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    environment = os.environ | {"PYTHONPATH": str(copy)}
    call = [sys.executable, "-c", linter, "--no-cache"]
    finished = subprocess.run(call, env=environment, cwd=copy, capture_output=True, text=True, check=False)
    assert "1 kept, 0 broken" in finished.stdout, finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def models(tiny: dict[str, Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the four requests read."""
    root = tmp_path_factory.mktemp("models")
    common = {**SMALL, "calibration": str(text_file)}
    quiet = common.pop("quiet")
    stage("prune", tiny["llama"], root / "pruned", "cfsp", quiet, {**common, "sparsity": 0.3, "round_to": 8})
    stage("quantize", tiny["llama"], root / "low", "rtn", quiet, {**common, "bits": 3, "group_size": 8})
    (root / "data.jsonl").write_text(
        "".join(json.dumps({"instruction": f"say {i}", "output": f"word {i} " * 3}) + "\n" for i in range(20))
    )
    return {"dense": tiny["llama"], "pruned": root / "pruned", "low": root / "low", "data": root / "data.jsonl"}


def files_that_run(folder: Path, call: types.FunctionType) -> set[str]:
    """The files below a folder of the package in which a function is called, relative to the package."""
    seen: set[str] = set()

    def watch(frame: types.FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            seen.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    package = ROOT / "compresskit"
    return {str(Path(name).relative_to(package)) for name in seen if Path(name).is_relative_to(folder)}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_a_method_is_understood_from_a_few_files(
    request_name: str, models: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    name, method = request_name.split()
    listed = re.findall(r"^\d+\. `([\w/]+\.py)`$", section(f"### `{request_name}`"), re.MULTILINE)
    lines = sum(len((ROOT / "compresskit" / file).read_text().splitlines()) for file in listed)
    assert len(listed) == len(set(listed)) <= MOST_FILES
    assert lines <= MOST_LINES
    common = {"calibration": str(text_file), "samples": 4, "sequence_length": 32}
    settings, source = {
        "prune": ({"sparsity": 0.3, "round_to": 8}, "dense"),
        "quantize": ({"bits": 3, "group_size": 8}, "dense"),
        "compensate": ({"original": str(models["dense"]), "rank": 2}, "low"),
        "recover": (
            {"original": str(models["dense"]), "data": (str(models["data"]),), "budget": 0.3, "sequence_length": 256,
             "select_only": True},
            "pruned",
        ),
    }[name]  # fmt: skip
    folder = ROOT / "compresskit" / FOLDERS[name]
    run = lambda: stage(name, models[source], tmp_path / "out", method, True, {**common, **settings})  # noqa: E731
    own = {file for file in listed if file.startswith(FOLDERS[name])}
    missing = files_that_run(folder, run) - own
    named = set(re.findall(r"`([\w/]+\.py)`", section(f"### `{request_name}`")))
    small = {file for file in missing if len((ROOT / "compresskit" / file).read_text().splitlines()) < 100}
    assert missing - small - named == set(), "larger files of the stage's folder run and are not in the list"
