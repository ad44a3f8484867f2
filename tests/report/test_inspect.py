"""report/inspect.py: widths, chains, changed files, ternary files. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoint_damage import edit_tensors
from conftest import SMALL, Run
from stock_adapters import make_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # raised inside peft


def test_inspect_shows_widths_and_the_chain(run: Run, model: Path, text_file: Path, tmp_path: Path) -> None:
    run("prune", "cfsp", model, tmp_path / "out", "--calibration", text_file, *SMALL)
    found = json.loads(run("inspect", tmp_path / "out", "--json")[1])
    assert found["family"] == "llama"
    assert found["chain"][0]["method"] == "cfsp"
    assert found["changed_files"] == []
    assert len(found["ffn_widths"]) == 3
    edit_tensors(tmp_path / "out", lambda tensors: tensors["model.norm.weight"].add_(1))
    assert "CHANGED" in run("inspect", tmp_path / "out")[1]


def test_inspect_shows_what_a_ternary_file_holds(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
    assert run("quantize", "compeft", adapter, tmp_path / "c", "--density", "0.1")[0] == 0
    code, text, _ = run("inspect", tmp_path / "c", "--json")
    assert code == 0
    found = json.loads(text)
    assert found["kind"] == "ternary adapter"
    assert sum(found["nonzeros_by_tensor"].values()) == found["nonzeros"] == round(0.1 * found["entries"])
    assert 0 < found["bits_per_entry"] < 1.5 * found["entropy_bits"] + 0.1
    assert "entropy_bits" in run("inspect", tmp_path / "c")[1]


def test_names_from_files_are_nothing_that_a_terminal_acts_on(run: Run, tiny: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(tiny["llama"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "a\x1b]0;b\x07\nCHANGED"}))
    text = run("inspect", adapter)[1]
    assert text.replace("\n", "").isprintable()
    assert not any(line.startswith("CHANGED") for line in text.splitlines())
