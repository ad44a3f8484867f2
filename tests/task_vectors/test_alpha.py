"""task_vectors/alpha.py: the factor with the least loss is taken. End to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from conftest import Run


def test_alpha_auto_takes_the_factor_with_the_least_loss(
    run: Run, tiny: dict[str, Path], adapter: Path, text_file: Path, tmp_path: Path
) -> None:
    arguments = ("--alpha", "auto", "--validation", text_file, "--base", tiny["llama"], "--windows", 1, "--sequence-length", 32)
    code, text, err = run("quantize", "compeft", adapter, tmp_path / "c", *arguments, "--json")
    assert code == 0, err
    result = json.loads(text)
    losses = result["validation_losses"]
    assert result["alpha"] == float(min(losses, key=lambda alpha: losses[alpha]))
    assert run("expand", tmp_path / "c", tmp_path / "e")[0] == 0
    scored = ("--adapter", tmp_path / "e", "--data", text_file, "--windows", 1, "--sequence-length", 32, "--json")
    code, text, _ = run("evaluate", tiny["llama"], *scored)
    assert code == 0
    assert np.isclose(np.log(json.loads(text)["perplexity"]), losses[str(result["alpha"])], rtol=1e-5)
