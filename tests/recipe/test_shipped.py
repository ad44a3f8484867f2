"""recipe/shipped.py: every shipped recipe loads, and runs from its first step to its last on a tiny model. End to end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import slow_but
from tiny_models import make_adapter

from compresskit.cli.main import main
from compresskit.methods import method_class, options_class
from compresskit.recipe import shipped
from compresskit.recipe.reading import load
from compresskit.recipe.run import run
from compresskit.report.page import write_reports

ROOT = Path(__file__).parents[2]
WANTED = {
    "demo", "cfsp", "gptq", "apiq", "eora", "compeft", "paser", "half-the-size", "3-bit", "2-bit", "faster-on-cpu",
    "adapter-zoo", "ci-gate", "ship-small", "experts-half",
}  # fmt: skip
TINY: dict[str, Any] = {
    "samples": 8, "sequence_length": 64, "windows": 2, "group_size": 8, "round_to": 8, "rank": 2, "epochs": 1, "steps": 2,
    "batch_size": 2, "self_samples": 4, "saliency": "none", "speed": False,
    "generations": 2,
}  # fmt: skip
LONGEST = 256
"""Tokens that the tiny model reads, a byte each: enough for an instruction with its answer."""

KEPT = ("name", "source", "stage", "method")


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_shipped_recipe_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters" / "one").mkdir(parents=True)
    recipe = load(shipped.find(name))
    assert recipe.description
    assert recipe.steps


def test_the_list_names_every_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(shipped.names()) == WANTED
    with pytest.raises(SystemExit):
        main(["run", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == WANTED
    assert all(len(line.split()) > 3 for line in lines)


def test_every_shipped_recipe_refers_to_the_schema() -> None:
    for name in WANTED:
        first = (ROOT / "recipes" / f"{name}.yaml").read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=./schema.json"


def tiny_step(step: dict[str, Any], text_file: Path) -> dict[str, Any]:
    """The step with the settings that a tiny model can bear; what the recipe does not set is left alone, but for sizes."""
    stage = next(key for key in step if key not in KEPT)
    method = step[stage]
    if stage == "recover":
        pytest.importorskip("scipy", reason="recover takes the extra compresskit[recover]")
        pytest.importorskip("peft", reason="recover takes the extra compresskit[recover]")
    sizes = [
        name for name in ("samples", "sequence_length", "windows") if name in options_class(stage, method or "").model_fields
    ]
    changed = {key: value and TINY.get(key, value) for key, value in step.items()} | {name: TINY[name] for name in sizes}
    if stage == "recover":
        changed["sequence_length"] = LONGEST
    if stage == "prune" and "round_to" in method_class(stage, method).model_fields:
        changed["round_to"] = TINY["round_to"]
    if stage == "evaluate":
        changed["data"] = str(text_file)
    elif "calibration" in options_class(stage, method).model_fields:
        changed["calibration"] = str(text_file)
    return changed


@pytest.mark.parametrize("name", slow_but("ci-gate", "cfsp", "gptq", of=shipped.names()))
def test_a_shipped_recipe_runs(name: str, tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    document = yaml.safe_load(shipped.find(name).read_text())
    document["steps"] = [tiny_step(step, text_file) for step in document["steps"]]
    document["source"] = str(tiny["qwen3_moe" if name == "experts-half" else "llama"])
    given = {}
    if "adapter" in document.get("variables", {}) or "adapters" in document.get("variables", {}):
        for number in range(2):
            make_adapter(tmp_path / "zoo" / f"expert-{number}", tiny["llama"], number)
        given = {"adapter": str(tmp_path / "zoo" / "expert-0"), "adapters": str(tmp_path / "zoo")}
    if "data" in document.get("variables", {}):
        rows = [{"instruction": f"count to {i}", "input": "", "output": " ".join(map(str, range(i)))} for i in range(2, 40)]
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"data": str(tmp_path / "data.jsonl")}
    document.pop("defaults", None)
    path = tmp_path / f"{name}.yaml"
    for file in shipped.folder().glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    path.write_text(yaml.safe_dump(document))
    known = {key: value for key, value in given.items() if key in document.get("variables", {})}
    recipe = load(path, known)
    result = run(recipe, tmp_path / "out")
    assert result["ran"] == [step.name for step in recipe.steps]
    assert len(result["gates"]) == len(document.get("gates", []))
    assert write_reports(tmp_path / "out", result).stat().st_size > 1000
