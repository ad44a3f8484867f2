"""machine/libraries.py: what commands import, and what they leave out; the collector works again afterwards. Property."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import gc, os, sys
from compresskit.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    print(end.code, gc.isenabled(), *sorted(name for name in sys.modules if "." not in name))
"""
ASKED = ("peft", "bitsandbytes", "compressed_tensors", "datasets", "gguf", "lm_eval", "rich")
"""What only the commands that use it import."""
NO_TEXT = ("--calibration", "builtin", "--sequence-length", "64", "--quiet")


def imported(*arguments: object) -> set[str]:
    """Top modules that a command imports; it succeeds, and the collector of cycles is on."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    code, collecting, *modules = finished.stdout.splitlines()[-1].split()
    assert (code, collecting) == ("0", "True"), finished.stdout + finished.stderr
    return set(modules)


@pytest.mark.parametrize("command", ["--help", "methods", "inspect", "quantize"])
def test_what_looks_at_no_weights_imports_neither_torch_nor_transformers(command: str, tiny: dict[str, Path]) -> None:
    arguments = {"inspect": ("inspect", tiny["llama"]), "quantize": ("quantize", "rtn", "--help")}.get(command, (command,))
    assert imported(*arguments) & {"torch", "transformers", *ASKED} == set()


def test_a_structure_that_was_derived_before_is_shown_without_torch(model: Path, own_structures: None) -> None:
    config = model / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"arcee"').replace("LlamaForCausalLM", "ArceeForCausalLM"))
    from checkpoint_damage import edit_tensors

    edit_tensors(model, lambda tensors: [tensors.pop(name) for name in list(tensors) if "gate_proj" in name])
    assert "torch" in imported("inspect", model)
    assert imported("inspect", model) & {"torch", "transformers"} == set()


def test_rounding_imports_no_library_that_it_does_not_use(tiny: dict[str, Path], tmp_path: Path) -> None:
    found = imported("quantize", "rtn", tiny["llama"], tmp_path / "out", "--group-size", "32", *NO_TEXT)
    assert "torch" in found
    assert found & set(ASKED) == set()


@pytest.mark.slow
def test_nothing_is_said_about_kernels_that_bitsandbytes_lacks(tiny: dict[str, Path], tmp_path: Path) -> None:
    base = [sys.executable, "-m", "compresskit"]
    for command in (("quantize", "nf4", tiny["llama"], tmp_path / "out", *NO_TEXT), ("inspect", tmp_path / "out")):
        finished = subprocess.run([*base, *map(str, command)], capture_output=True, text=True, check=True)
        assert finished.stderr == ""
    rows = [{"instruction": f"Say {word}.", "output": f"{word} " * 20} for word in ["one", "two", "three", "four", "five", "six"]]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = (tiny["llama"], tmp_path / "trained", "--original", tiny["llama"], "--data", tmp_path / "data.jsonl")
    recover = [*base, *map(str, ("recover", "full", *places, "--steps", 1, "--sequence-length", 256, "--quiet"))]
    assert subprocess.run(recover, capture_output=True, text=True, check=True).stderr == ""


def test_threads_wait_asleep_unless_the_environment_says_otherwise() -> None:
    script = "import os, sys; from compresskit.cli.main import main; sys.argv = ['x', 'methods']\ntry: main()\n"
    script += "except SystemExit: sys.stderr.write(os.environ['OMP_WAIT_POLICY'])"
    without = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for given, wanted in ((without, "PASSIVE"), (without | {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        finished = subprocess.run([sys.executable, "-c", script], env=given, capture_output=True, text=True, check=True)
        assert finished.stderr == wanted
