"""cli/stages.py: streams, exit codes and JSON keys of the stages' commands. End to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL, Run

from compresskit.checkpoint.reader import sha256
from compresskit.methods import METHODS

STAGE_KEYS = {
    "stage", "method", "output", "source", "seconds", "peak_memory_bytes", "parameters_before", "parameters_after",
    "bytes_before", "bytes_after", "settings", "sparsity_achieved", "widths",
}  # fmt: skip
EVALUATE_KEYS = {
    "perplexity", "tokens", "kl", "top1_agreement", "perplexity_ratio", "size_ratio", "tasks", "speed", "gates",
}  # fmt: skip


def test_a_stage_prints_its_output_folder_and_nothing_else(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    code, out, err = run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    assert (code, out) == (0, f"{tmp_path / 'out'}\n")
    assert "prune cfsp" in err


def test_json_is_one_object_with_the_documented_keys(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    code, out, _ = run("prune", "flap", model, tmp_path / "out", "--calibration", text_file, *SMALL, "--json", "--sparsity", 0.3)
    assert code == 0
    result = json.loads(out)
    assert result.keys() >= STAGE_KEYS
    assert result["settings"]["sparsity"] == 0.3
    assert abs(result["sparsity_achieved"] - 0.3) <= 2 / 96
    manifest = json.loads((tmp_path / "out" / "compresskit.json").read_text())
    assert manifest["outputs"]["sha256"] == {"model.safetensors": sha256(tmp_path / "out" / "model.safetensors")}
    assert manifest["inputs"]["sha256"] == {"model.safetensors": sha256(model / "model.safetensors")}


@pytest.mark.slow
def test_stages_make_a_shell_pipeline(model: Path, text_file: Path, tmp_path: Path) -> None:
    tool = f"{sys.executable} -m compresskit"
    line = (
        f"{tool} prune magnitude {model} {tmp_path / 'a'} --no-refit --round-to 4 | "
        f"{tool} prune cfsp - {tmp_path / 'b'} --calibration {text_file} {' '.join(SMALL)} | "
        f"{tool} evaluate - --against {model} --data {text_file} --windows 4 --sequence-length 64 --json"
    )
    finished = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report.keys() >= EVALUATE_KEYS
    assert report["size_ratio"] < 1
    assert report["source"] == str(tmp_path / "b")
    chain = json.loads((tmp_path / "b" / "compresskit.json").read_text())
    assert [chain["method"], chain["source"]["method"]] == ["cfsp", "magnitude"]


def test_a_gate_that_is_missed_exits_3_after_everything_is_printed(run: Run, model: Path, text_file: Path) -> None:
    common = ("evaluate", model, "--data", text_file, "--windows", 2, "--sequence-length", 64)
    code, out, err = run(*common, "--gate", "perplexity<=1", "--gate", "perplexity>0", "--json")
    assert code == 3
    assert [gate["passed"] for gate in json.loads(out)["gates"]] == [False, True]
    assert "perplexity<=1: missed by" in err
    assert run(*common, "--gate", "perplexity>0")[0] == 0


def test_the_default_text_is_the_part_of_the_documentation_that_calibration_never_takes(run: Run, model: Path) -> None:
    code, out, _ = run("evaluate", model, "--windows", 2, "--sequence-length", 64, "--json")
    assert code == 0
    assert "documentation" in json.loads(out)["text"]


def test_evaluating_without_a_terminal_prints_a_table(run: Run, model: Path, text_file: Path) -> None:
    code, out, _ = run("evaluate", model, "--against", model, "--data", text_file, "--windows", 2, "--sequence-length", 64)
    assert code == 0
    assert "perplexity (lower is better)" in out
    assert "x 1.000" in out
    assert f"measured on: {text_file.name}" in out


def test_methods_lists_every_method(run: Run) -> None:
    table = json.loads(run("methods", "--json")[1])
    assert {stage: list(found) for stage, found in table.items()} == {stage: list(found) for stage, found in METHODS.items()}
