"""api.py: the stages from Python are those of the command line. End to end on tiny models."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import compresskit
from compresskit.errors import RequestError

SMALL = {"samples": 8, "sequence_length": 64}


def test_importing_the_stages_loads_no_torch() -> None:
    script = "import sys; from compresskit import prune, quantize, compensate, evaluate, run; print('torch' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "False"


def test_stages_run_with_the_flags_as_arguments(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    from compresskit import compensate, evaluate, prune, quantize

    small, low, fix = (tmp_path / name for name in ("small", "low", "fix"))
    shared = {"calibration": text_file, "quiet": True, **SMALL}
    assert prune(tiny["llama"], small, "cfsp", sparsity=0.25, round_to=8, **shared)["sparsity_achieved"] == 0.25
    assert quantize(small, low, "rtn", bits=4, group_size=8, **shared)["output"] == str(low)
    assert compensate(low, fix, original=small, rank=2, **shared)["rank_total"] > 0
    report = evaluate(fix, against=tiny["llama"], data=text_file, windows=2, sequence_length=64, quiet=True)
    assert report["size_ratio"] < 1


def test_a_stage_is_a_function_whichever_of_its_modules_was_imported() -> None:
    importlib.import_module("compresskit.pruning.cfsp")
    assert compresskit.prune is compresskit.api.prune


def test_wrong_settings_are_refused_before_any_work(tiny: dict[str, Path], tmp_path: Path) -> None:
    from compresskit import evaluate, prune

    for settings, words in (({"sparsty": 0.2}, "Did you mean 'sparsity'"), ({"sparsity": 2}, "sparsity: input should be less")):
        with pytest.raises(RequestError, match=words):
            prune(tiny["llama"], tmp_path / "out", **settings)
    with pytest.raises(RequestError, match="Did you mean 'against'"):
        evaluate(tiny["llama"], againts="x")
    with pytest.raises(AttributeError, match="has no attribute 'shrink'"):
        compresskit.shrink  # noqa: B018


def test_a_recipe_runs_from_python(tiny: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    from compresskit import run

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "source: nowhere\nsteps: [{quantize: rtn, group_size: 8, sequence_length: 64}, "
        f"{{evaluate: , against: source, data: {text_file}, windows: 2, sequence_length: 64}}]\ngates: [size_ratio<=1]"
    )
    said: list[str] = []
    result = run(recipe, tmp_path / "out", {"source": str(tiny["llama"])}, say=said.append)
    assert result["passed"]
    assert len(said) == 2
    assert (tmp_path / "out" / "report.html").is_file()
